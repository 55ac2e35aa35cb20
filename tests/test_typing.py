"""Public callables say the types of what they take and return. That those hold, `make lint` checks."""

import inspect
import types

import kdkernels as kd

MODULES = [x for x in (getattr(kd, name) for name in kd.__all__) if inspect.ismodule(x)]


def callables():
    """Name -> function: those of kdkernels.__all__ and of its modules, constructors and public methods of classes."""
    for owner in (kd, *MODULES):
        for name in getattr(owner, "__all__", [x for x in vars(owner) if not x.startswith("_")]):
            found = getattr(owner, name)
            if not getattr(found, "__module__", "").startswith("kdkernels" if owner is kd else owner.__name__):
                continue  # of torch, or imported
            for own, function in methods(found) if isinstance(found, type) else [("", found)]:
                if isinstance(function, types.FunctionType) and function.__module__.startswith("kdkernels"):
                    yield f"{owner.__name__}.{name}{own}", function


def methods(cls):
    for name in dir(cls):
        if name == "__init__" or not name.startswith("_"):
            found = inspect.getattr_static(cls, name)
            found = found.fget if isinstance(found, property) else getattr(found, "__func__", found)
            yield f".{name}", inspect.unwrap(found) if callable(found) else found


def bare(function):
    """What has no annotation."""
    found = inspect.signature(function)
    names = [x.name for x in found.parameters.values() if x.annotation is x.empty and x.name not in ("self", "cls")]
    return names + ["return"] * (found.return_annotation is found.empty)


def test_every_public_callable_is_annotated():
    assert {name: bare(function) for name, function in callables() if bare(function)} == {}


def test_the_public_callables_are_found():
    names = dict(callables())
    some = "ForwardKLLoss.value ULDLoss.value_and_grad vocab_shards tape.where cache.Reader.examples metrics.spearman"
    assert {f"kdkernels.{name}" for name in some.split()} <= names.keys()
