"""A model folder at work where only PyTorch and Transformers are installed: `make test-bare`.

    python -I -W error tests/bare_environment.py [FOLDER]

Copies FOLDER (default: checkpoints/mambaformer-tiny) elsewhere, then loads, generates, switches expert vectors,
saves and reloads it. Plain Python without pytest: prints what it checked, and exits with 1 if something failed.
"""

import importlib.util
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORK = Path(tempfile.mkdtemp(prefix="mambaformer-bare-"))
os.environ.update(HF_HUB_OFFLINE="1", HF_HOME=str(WORK / "home"), MAMBAFORMER_CACHE=str(WORK / "cache"))

import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, GenerationConfig  # noqa: E402

PROMPT = "In the beginning God"
MODULE = "model.layers.{}.mlp.down_proj"


class Folder:
    """The copied folder, and one check for each method whose name is a sentence."""

    def __init__(self, source: Path):
        self.path = shutil.copytree(source, WORK / "copy")
        names = [MODULE.format(layer) for layer in range(2)]
        self.vectors = {name: torch.linspace(3.0, 0.0, 64) for name in names}

    def load(self, path: Path | None = None):
        return AutoModelForCausalLM.from_pretrained(path or self.path, trust_remote_code=True, dtype=torch.float32)

    def answer(self, model=None, **options) -> list[int]:
        options = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False, **options}
        return (model or self.model).generate(self.ids, **options)[0].tolist()

    @torch.no_grad()
    def logits(self, ids: torch.Tensor, **options) -> torch.Tensor:
        return self.model(ids, **options).logits[:, -1]

    def nothing_else_is_installed(self):
        for name in ("mambaformer", "pytest", "accelerate", "peft", "datasets"):
            assert importlib.util.find_spec(name) is None, f"{name} is installed"

    def the_copied_folder_loads(self):
        self.tokenizer = AutoTokenizer.from_pretrained(self.path, trust_remote_code=True)
        self.ids = self.tokenizer(PROMPT, return_tensors="pt").input_ids
        self.model = self.load()

    def the_code_is_the_one_of_the_folder(self):
        assert "transformers_modules" in type(self.model).__module__ and "mambaformer" not in sys.modules

    def a_generation_with_a_cache_equals_one_without(self):
        tokens = self.answer()
        assert len(tokens) == self.ids.shape[1] + 16
        assert tokens == self.answer(use_cache=False)
        assert self.tokenizer.decode(tokens).startswith(PROMPT)

    def a_chat_continues_from_its_cache(self):
        whole, cache = self.answer(), self.model.make_cache()
        begun = self.model.generate(self.ids, max_new_tokens=8, do_sample=False, cache=cache)
        again = self.model.generate(begun, max_new_tokens=8, min_new_tokens=8, do_sample=False, cache=cache)
        assert again[0].tolist() == whole

    def an_expert_vector_is_made_from_a_dict_and_changes_the_answer(self):
        self.model.expert_vectors.add("bold", self.vectors)
        assert self.model.expert_vectors.names == ["bold"]
        assert self.answer(expert_vector="bold") == self.answer(expert_vector=self.vectors) != self.answer()

    def a_switch_during_a_generation_equals_a_fresh_forward_under_the_new_vector(self):
        tokens = torch.tensor([self.answer(expert_schedule={0: None, 8: "bold"})])
        assert tokens[0, :-8].tolist() == self.answer(max_new_tokens=8, min_new_tokens=8)
        assert self.logits(tokens[:, :-1], expert_vector="bold").argmax(-1) == tokens[0, -1]

    def rows_of_a_batch_have_vectors_of_their_own(self):
        rows = self.logits(self.ids.repeat(2, 1), expert_vector=[None, "bold"])
        for row, vector in zip(rows, (None, "bold"), strict=True):
            alone = self.logits(self.ids, expert_vector=vector)[0]
            torch.testing.assert_close(row, alone, atol=1e-5 * alone.abs().max().item(), rtol=0)

    def a_blend_is_made_merged_and_undone(self):
        library = self.model.expert_vectors
        library.add(library.blend([(0.5, "bold"), (0.25, self.vectors)], name="mixed"))
        before, on_the_fly = self.logits(self.ids), self.logits(self.ids, expert_vector="mixed")
        self.model.merge_expert_vector("mixed")
        merged = self.logits(self.ids)
        self.model.unmerge_expert_vector()
        torch.testing.assert_close(merged, on_the_fly, atol=1e-4 * merged.abs().max().item(), rtol=0)
        assert torch.equal(self.logits(self.ids), before)

    def an_expert_vector_is_saved_to_a_file_and_loaded(self):
        self.model.expert_vectors["bold"].save(WORK / "bold.safetensors")
        other = self.load()
        assert other.load_expert_vectors(WORK / "bold.safetensors") == ["bold"]
        assert self.answer(other, expert_vector="bold") == self.answer(expert_vector="bold")

    def a_saved_folder_reloads_with_its_expert_vectors_and_answers_the_same(self):
        self.model.save_pretrained(WORK / "again")
        self.tokenizer.save_pretrained(WORK / "again")
        again = self.load(WORK / "again")
        assert again.expert_vectors.names == ["bold", "mixed"]
        for vector in (None, "bold", "mixed"):
            assert self.answer(again, expert_vector=vector) == self.answer(expert_vector=vector)

    def a_session_continues_in_the_reloaded_model(self):
        cache = self.model.make_cache()
        self.model.generate(self.ids, max_new_tokens=8, do_sample=False, cache=cache, expert_vector="bold")
        cache.save(WORK / "session.safetensors")
        again = self.load(WORK / "again")
        loaded = again.load_cache(WORK / "session.safetensors")
        ids = cache.token_ids[0]
        more = torch.tensor([[*map(int, ids), *self.ids[0].tolist()]])
        options = {"max_new_tokens": 8, "do_sample": False}
        one = self.model.generate(more, cache=cache, **options)
        assert again.generate(more, cache=loaded, **options).tolist() == one.tolist()

    def the_other_auto_classes_load_the_folder(self):
        assert AutoConfig.from_pretrained(self.path, trust_remote_code=True).model_type == "mambaformer"
        base = AutoModel.from_pretrained(self.path, trust_remote_code=True, dtype=torch.float32)
        assert base(self.ids).last_hidden_state.shape[:2] == self.ids.shape

    def the_first_example_of_the_readme_runs(self):
        shutil.copytree(self.path, WORK / "checkpoints" / "mambaformer-tiny")
        code = (ROOT / "README.md").read_text().split("```python\n")[1].split("```")[0]
        os.chdir(WORK)
        exec(compile(code, "README.md", "exec"), {"__name__": "example"})
        os.chdir(ROOT)

    def a_generation_configuration_works_as_elsewhere(self):
        config = GenerationConfig(max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None)
        assert self.model.generate(self.ids, config)[0].tolist() == self.answer()[:-11]


def run(checks: list[Callable[[], None]]) -> int:
    """Runs them in order, later ones using what earlier ones left; returns how many failed."""
    failed = 0
    for check in checks:
        try:
            check()
            print(f"ok      {check.__name__.replace('_', ' ')}", flush=True)
        except Exception:  # the report goes on
            failed += 1
            print(f"FAILED  {check.__name__.replace('_', ' ')}\n{traceback.format_exc()}", flush=True)
    print(f"{len(checks) - failed} passed, {failed} failed")
    return failed


def main(argv: list[str]) -> int:
    print(f"Python {sys.version.split()[0]}, PyTorch {torch.__version__}, Transformers {transformers.__version__}")
    transformers.utils.logging.disable_progress_bar()
    folder = Folder(Path(argv[0]) if argv else ROOT / "checkpoints" / "mambaformer-tiny")
    try:
        kept = ("load", "answer", "logits")
        names = [name for name in vars(Folder) if not name.startswith("_") and name not in kept]
        return int(run([getattr(folder, name) for name in names]) > 0)
    finally:
        shutil.rmtree(WORK)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
