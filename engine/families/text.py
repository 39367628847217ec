"""Text models without an encoder: chat and completion, no pictures."""

from engine.families.protocol import Description, Family, check_text


class TextOnly(Family):
    """Nothing beside what every family has."""

    def __init__(self, description: Description) -> None:
        super().__init__(description)
        check_text(self.text_config)
