"""From a ConfigDict at the door to frozen dataclasses inside.

`build(ModelConfig, config.model, "model")` checks every key and type of a section and
reports the first mistake as one line. Nothing behind it sees a ConfigDict.

Modules: `sections` (a section is checked), `fields` (what a field says of itself), `loading`
(files).
"""

from memoryformer.config.fields import (
    ANY,
    CHANGES,
    NoOptions,
    defaults,
    described,
    field,
    forget_options,
    freeze,
    options_class,
    override,
)
from memoryformer.config.loading import explained, load, load_module, shipped
from memoryformer.config.sections import at_least, build, choose, flatten, nest, suggest

__all__ = [
    "ANY",
    "CHANGES",
    "NoOptions",
    "at_least",
    "build",
    "choose",
    "defaults",
    "described",
    "explained",
    "field",
    "flatten",
    "forget_options",
    "freeze",
    "load",
    "load_module",
    "nest",
    "options_class",
    "override",
    "shipped",
    "suggest",
]
