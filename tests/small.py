"""What several tests share: small models, a counter of looks at numbers, the one line that an error must be."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llamba_ref.llama import LlamaConfig
from llamba_ref.llamba import LlambaConfig, MLPConfig, SSMConfig
from llamba_ref.mamba2 import Mamba2Config

VOCAB = 48
RELEASED = {"start": "published", "rotation": "none"}  # a student as in the paper, quickly made


def llama_config(**changes) -> LlamaConfig:
    """Two layers with grouped queries, and heads whose widths do not add up to the model's."""
    sizes = dict(vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, head_dim=8)
    return LlamaConfig(**sizes | changes)


def mamba2_config(**changes) -> Mamba2Config:
    """Two layers of eight heads, with chunks that a test's text does not fit into."""
    return Mamba2Config(**dict(vocab_size=VOCAB, d_model=16, n_layer=2, d_state=5, headdim=4, chunk_size=16) | changes)


def llamba_config(**changes) -> LlambaConfig:
    """Two layers of four heads, chunks as in `mamba2_config`."""
    sizes = dict(vocab_size=VOCAB, d_model=16, n_layer=2, ssm_cfg=SSMConfig(5, 4, 4, chunk_size=16),
                 mlp_cfg=MLPConfig(24))
    return LlambaConfig(**sizes | changes)


def shaken(module):
    """No parameter at a special value, step sizes and decays that matter: dt from 0.05 to 1.3, A around -1."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
            if name.endswith("A_log"):
                parameter.normal_(0, 0.7)
            if name.endswith("dt_bias"):
                parameter.uniform_(-3, 1)
    return module


class HostReads(TorchDispatchMode):
    """Counts how often a number of a tensor is looked at: what a GPU has to be waited for. A result whose shape depends
    on numbers is such a look, such as what a mask picks out, and so is a comparison of all numbers.

    `tolist`, `numpy`, copies to the host, and what an operation of PyTorch looks at inside it does not see."""

    count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        looks = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output} & set(operation.tags)
        if operation.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_):
            looks = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        self.count += bool(looks)  # numbers as an index leave the shape alone
        return operation(*args, **(kwargs or {}))


def one_line(error) -> str:
    """The message of an exception that pytest caught, which must be a single line."""
    assert "\n" not in str(error.value)
    return str(error.value)
