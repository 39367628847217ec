from tests.services import postgresql_server

__all__ = ["postgresql_server"]
