"""The trainings behind the published figures, run from the repository's root: `python -m recipes.language.pretrain`.

`language` trains and measures language models and expert vectors, `icl` compares architectures at in-context learning,
and `sweeps` runs many trainings in parallel. Recipes need the extra `train` and are not part of the installed package.
"""
