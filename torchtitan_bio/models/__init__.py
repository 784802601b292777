"""The table of model families, and the contract that each of them keeps.

A family is a module with
- `Architecture`: a frozen dataclass that holds every number of a model and refuses those that cannot work;
- `FLAVORS`: name -> Architecture;
- `flops_per_token(architecture, seq_len)`: floating-point operations of training on one token of a document of that length,
  causal attention counted as half, linear in seq_len;
- `Model(architecture, attend, ffn_tiles=1)`: an nn.Module without buffers, built on any device (meta too), with
    blocks()                      the units to recompute, compile and shard, in order; their forward draws no random numbers
    init_weights(seed, own_part)  fills each parameter in place, an element by the seed, the parameter's name and its own index
                                  alone; own_part(parameter) is (the tensor to fill, how many elements lie before it)
    forward(inputs)               {term: summed loss, fp32 scalar}
    logits(inputs)                where that has meaning; inputs["attends"], an attend for each block, then stand in for the
                                  model's own, as a cache of keys and values does
"""

import dataclasses
import difflib
import importlib

FAMILIES = {"llama3": "torchtitan_bio.models.llama3"}


def resolve(name: str, flavor: str, overrides: dict):
    """The family's Architecture: a flavor with some numbers replaced. One ValueError, a line for each problem."""
    if name not in FAMILIES:
        raise ValueError(_unknown("model.name", name, FAMILIES))
    family = importlib.import_module(FAMILIES[name])
    problems = []
    if flavor not in family.FLAVORS:
        problems.append(_unknown("model.flavor", flavor, family.FLAVORS))
    keys = [field.name for field in dataclasses.fields(family.Architecture)]
    problems += [_unknown("model.overrides", key, keys) for key in overrides if key not in keys]
    known = {key: value for key, value in overrides.items() if key in keys}
    base = family.FLAVORS.get(flavor) or next(iter(family.FLAVORS.values()))
    try:
        architecture = dataclasses.replace(base, **known)
    except ValueError as error:
        problems += str(error).split("\n")
    if problems:
        raise ValueError("\n".join(problems))
    return architecture


def restore(name: str, numbers: dict):
    """The Architecture of which model.json holds the numbers; ValueError where they are not of this version."""
    if name not in FAMILIES:
        raise ValueError(_unknown("family", name, FAMILIES))
    try:
        return importlib.import_module(FAMILIES[name]).Architecture(**numbers)
    except TypeError as error:
        raise ValueError(f"model.json has other numbers than a {name} of this version: {error}") from error


def build(name: str, architecture, attend=None, **options):
    """The model itself, on the device that is current; weights are what init_weights makes of them."""
    return importlib.import_module(FAMILIES[name]).Model(architecture, attend, **options)


def _unknown(where: str, given: str, known) -> str:
    by_lower = {one.lower(): one for one in known}
    close = difflib.get_close_matches(given.lower(), by_lower, n=1)
    hint = f"; did you mean {by_lower[close[0]]!r}?" if close else ""
    return f"{where}: {given!r} is not one of {', '.join(known)}{hint}"
