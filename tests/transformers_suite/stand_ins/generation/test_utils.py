"""transformers' own is not in its source distribution: ours is tests/modeling_mtt."""


class GenerationTesterMixin:
    pass
