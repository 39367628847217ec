"""/v1/models: what this service is set up to run."""

from typing import Any

from fastapi import APIRouter, Response
from pydantic import BaseModel

from api.answers import answer_json, describe_json
from api.auth import Asker
from api.config import ServedModel
from api.errors import MissingError
from api.services import Here

router = APIRouter(prefix="/v1/models", tags=["Models"])


class Model(BaseModel):
    id: str
    object: str
    created: int
    owned_by: str


class ModelList(BaseModel):
    object: str
    data: list[Model]


@router.get("", responses=describe_json(ModelList))
def list_models(asker: Asker, here: Here) -> Response:
    return answer_json({"object": "list", "data": list(map(_build, here.config.models))})


@router.get("/{model_id:path}", responses=describe_json(Model))
def retrieve_model(model_id: str, asker: Asker, here: Here) -> Response:
    for model in here.config.models:
        if model.id == model_id:
            return answer_json(_build(model))
    raise MissingError(
        "There is no model of this name here.", param="model", code="model_not_found"
    )


def _build(model: ServedModel) -> dict[str, Any]:
    return {
        "id": model.id,
        "object": "model",
        "created": model.created_at,
        "owned_by": model.owned_by,
    }
