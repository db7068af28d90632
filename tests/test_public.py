"""What `import llamba_ref as lr` gives, and what it costs."""

import subprocess
import sys
from importlib import import_module

import pytest

import llamba_ref as lr


def python(script):
    """What a script prints in a Python of its own."""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("name", lr.__all__)
def test_name_is_what_its_module_defines(name):
    home = import_module(f"llamba_ref.{lr.HOME[name]}")
    assert getattr(lr, name) is getattr(home, name)
    assert getattr(lr, name).__module__ == home.__name__
    assert name in dir(lr)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="llamba_ref.*no attribute 'attention_is_all'"):
        lr.attention_is_all  # noqa: B018


@pytest.mark.parametrize("first", ["import llamba_ref.ssd", "from llamba_ref.llamba import Llamba", "lr.ssd", "pass"])
def test_functions_win_over_modules_of_their_name(first):
    """Python puts a submodule that was imported into its package's namespace, under the function's name."""
    script = f"import llamba_ref as lr\n{first}\nfrom llamba_ref.ssd import ssd\n"
    script += "print(lr.ssd is ssd, type(lr.ssd).__name__)"
    assert python(script) == ["True", "function"]


def test_import_is_light():
    """Nothing is loaded before it is asked for, not even torch; the operators ask for no transformers."""
    lazy = "import sys, llamba_ref; print('torch' in sys.modules, 'transformers' in sys.modules)"
    assert python(lazy) == ["False", "False"]
    heavy = ("transformers", "datasets", "accelerate", "matplotlib")
    operators = ("import sys, llamba_ref as lr; lr.linear_scan, lr.gateloop, lr.ssd, lr.causal_conv\n"
                 f"print(*[name for name in {heavy} if name in sys.modules])")
    assert python(operators) == []


def test_import_takes_under_half_a_second_beyond_torch():
    """The quickest of three, since the machine may be busy."""
    script = "import time, torch; began = time.perf_counter(); import llamba_ref; print(time.perf_counter() - began)"
    assert min(float(*python(script)) for _ in range(3)) < 0.5
