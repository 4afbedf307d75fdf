"""Launchers in this process, each as if it were the only one."""

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType

import pytest
from absl import flags

import jaxspark.launch

PACKAGE = "jaxspark.launch"


@pytest.fixture
def load() -> Iterator[Callable[[str], ModuleType]]:
    """Imports a launcher by name; flags of others are not defined meanwhile."""
    with ExitStack() as stack:
        yield lambda name: stack.enter_context(_alone(name))


@contextmanager
def _alone(name: str) -> Iterator[ModuleType]:
    modules = {key: each for key, each in sys.modules.items() if _ours(key)}
    defined = [
        (module, flag)
        for module, each in flags.FLAGS.flags_by_module_dict().items()
        for flag in each
        if _ours(module)
    ]
    _forget()
    try:
        yield importlib.import_module(f"{PACKAGE}.{name}")
    finally:
        _forget()
        sys.modules |= modules
        for key, module in modules.items():
            setattr(jaxspark.launch, key.rpartition(".")[2], module)
        for module, flag in defined:
            flags.DEFINE_flag(flag, module_name=module)
        flags.FLAGS.unparse_flags()


def _ours(module: str) -> bool:
    return module.startswith(f"{PACKAGE}.")


def _forget() -> None:
    """Removes launchers and their flags from this process."""
    for name in [key for key in sys.modules if _ours(key)]:
        del sys.modules[name]
        vars(jaxspark.launch).pop(name.rpartition(".")[2], None)
    for name in list(flags.FLAGS):
        if _ours(flags.FLAGS.find_module_defining_flag(name)):
            delattr(flags.FLAGS, name)
