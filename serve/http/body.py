"""What all JSON objects that a client sends have in common."""

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError


def _check_text(text: str) -> str:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError("half of a surrogate pair is no text") from None
    return text


Text = Annotated[str, AfterValidator(_check_text)]


class Body(BaseModel):
    """A JSON object whose every member is understood."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _leave_out_nulls(cls, data: Any) -> Any:
        return {key: value for key, value in data.items() if value is not None} if isinstance(data, dict) else data


def invalid(param: str, message: str) -> PydanticCustomError:
    """What a validator raises for a value that is wrong in a way that types cannot say."""
    return PydanticCustomError("invalid", "{message}", {"param": param, "message": message})
