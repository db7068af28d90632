"""How a Transformer becomes a recurrent model: `import llamba_ref as lr` gives the public names, each when asked for."""

import sys
from importlib import import_module
from types import ModuleType

__version__ = "0.1.0"

PUBLIC = {  # module -> the names that it gives to the package
    "scan": ("linear_scan",),
    "gateloop": ("GateLoop", "gateloop", "gateloop_matrix"),
    "ssd": ("ssd", "ssd_matrix", "ssd_step"),
    "conv": ("causal_conv", "causal_conv_step"),
    "decoder": ("Decoder", "with_mixers"),
    "gateloop_lm": ("GateLoopConfig", "GateLoopLM"),
    "mamba2": ("Mamba2", "Mamba2Config", "Mamba2LM"),
    "llama": ("Attention", "Llama", "LlamaConfig"),
    "discrete": ("DiscreteMamba2",),
    "rotation": ("RotaryMamba2",),
    "mamba3": ("Mamba3", "Mamba3Config", "Mamba3LM", "trapezoid", "trapezoid_matrix", "trapezoid_step"),
    "llamba": ("Llamba", "LlambaConfig"),
    "mohawk": ("alignment_loss", "distill", "distillation_loss", "orientation_loss"),
    "delta": (
        "GatedDeltaNet", "GatedDeltaNetConfig", "GatedDeltaNetLM", "RWKV7", "RWKV7Config", "RWKV7LM", "delta_matrix",
        "delta_rule", "generalized_delta_matrix", "generalized_delta_rule"),
    "evaluate": ("compare", "evaluate", "generate_text"),
    "data": (
        "Batch", "Batches", "MixedBatches", "StreamBatches", "StreamShares", "load_documents", "load_tokenizer", "pack",
        "split_documents"),
    "training": ("Run", "Stage", "train"),
    "models": ("load_model", "save_model"),
}
HOME = {name: module for module, names in PUBLIC.items() for name in names}
__all__ = sorted(HOME)


class Package(ModuleType):
    """A module whose public names win over submodules of their name: `lr.ssd` is the function, whatever was imported."""

    def __setattr__(self, name, value):
        if name in HOME and isinstance(value, ModuleType):  # what Python does after it has imported llamba_ref.ssd
            value = getattr(value, name)
        super().__setattr__(name, value)


def __getattr__(name):
    if name not in HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{HOME[name]}"), name)
    setattr(sys.modules[__name__], name, value)
    return value


def __dir__():
    return sorted({*globals(), *HOME})


sys.modules[__name__].__class__ = Package
