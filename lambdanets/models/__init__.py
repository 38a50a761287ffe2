"""Models: the LambdaResNets, timm's, and what is made of them."""

# First of all: `create` is imported right after it, to register our models, and needs the other files here whole.
import timm.models  # noqa: F401
