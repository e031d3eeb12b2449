"""Models: `specs`, a tree of `ParamSpec`; `transformer`, pure functions over it."""
