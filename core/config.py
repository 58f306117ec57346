"""The base class of every component's config."""

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """A frozen group of settings; unknown keys are errors.

    Each component defines its own beside its class; a run's YAML is the tree of them
    (:class:`coterie.launch.config.RunConfig`). Give every field a ``Field(description=...)``:
    ``coterie config schema`` and the reference are made from it.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True
    )
