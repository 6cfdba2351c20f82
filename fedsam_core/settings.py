"""Base of every configuration section: immutable, and an unknown key is an error."""

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """A section of the configuration tree. Unknown keys and wrong types, infinity and NaN are refused by pydantic."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)
