"""What one of two processes does, as `test_placement.py` has it started.

    accelerate launch --num_processes 2 ... tests/in_two_processes.py FOLDER

Everything that was found goes into FOLDER/RANK.safetensors and FOLDER/RANK.json, and is judged by the tests.
"""

import json
import os
import random
import sys
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from safetensors.torch import save_file

from mambaformer import MambaFormerForCausalLM, expert_bases_mambaformer
from patterns import tiny_config
from sequences import feed, ragged_turns, random_rows
from tiny_models import random_expert, random_model

PATTERNS = ("everything", "paper")
ROWS = random_rows(3, (9, 9))
RAGGED = random_rows(4, (8, 5, 9))
GENERATE = {"max_new_tokens": 8, "do_sample": False}
STEPS = [4, 1, 1, 3]
EXPERT_SEED = 5
# What FSDP gathers at a time: whole layers, as `_no_split_modules` says, or every module by itself.
FSDP_WRAPS = {
    "by_layer": None,
    "by_module": ["Linear", "MambaFormerConv1d", "MambaFormerRMSNorm", "MambaFormerMambaMixer"],
}


def config_of(pattern):
    return tiny_config(pattern, vocab_size=64)  # the oldest supported Transformers wants an even number


def count_encoded(model):
    """A list that grows by the number of tokens of every forward."""
    lengths = []
    model.model.embed_tokens.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    return lengths


@torch.no_grad()
def infer(model, expert):
    """Logits and texts, with and without a cache and an expert; by name."""
    ids = torch.tensor(ROWS)
    lengths, found, notes = count_encoded(model), {"logits": model(ids).logits}, {}
    cache = model.make_cache()
    found["steps"] = torch.cat([model(part, past_key_values=cache).logits for part in ids.split(STEPS, 1)], 1)
    notes["cache_bytes"] = cache.report()
    for name, options in {"dense": {}, "static": {"storage": "static", "max_cache_len": 96}}.items():
        turns = ragged_turns(random.Random(0), RAGGED, 3)
        found[f"ragged_{name}"] = torch.cat(feed(model, model.make_cache(**options), turns))
    lengths.clear()
    found["text"] = model.generate(ids, **GENERATE)
    found["text_under_expert"] = model.generate(ids, expert_schedule={0: None, 3: expert}, **GENERATE)
    notes["encoded"] = lengths.copy()
    found["expert"] = model(ids, expert_vector=expert).logits
    found["rows_of_experts"] = model(ids, expert_vector=[None, expert]).logits
    return found, notes


def learn(model, expert):
    """The gradients of all weights, and of the scales of an expert, under that expert."""
    ids = torch.tensor(ROWS)
    scales = {name: z.double().requires_grad_() for name, z in expert.vectors.items()}
    model(ids, labels=ids, expert_vector=scales).loss.backward()
    found = {f"z.{name}": z.grad for name, z in scales.items()}
    for name, weight in model.named_parameters():
        found[f"grad.{name}"] = weight.grad.full_tensor() if hasattr(weight.grad, "full_tensor") else weight.grad
    return found


def tensor_parallel(folder):
    """Every pattern, split over the processes by its own plan; they compute singular vectors of opposite signs."""
    found, notes = {}, {}
    sign = 1 - 2 * torch.distributed.get_rank()
    compute = expert_bases_mambaformer.compute_basis
    expert_bases_mambaformer.compute_basis = lambda weight: replace(
        compute(weight), vectors=sign * compute(weight).vectors
    )
    for pattern in PATTERNS:
        model = MambaFormerForCausalLM.from_pretrained(folder / pattern, tp_plan="auto", dtype=torch.float64).eval()
        expert = random_expert(random_model(config_of(pattern)), EXPERT_SEED)
        here, notes[pattern] = infer(model, expert)
        model.merge_expert_vector(expert)
        here["merged"] = model(torch.tensor(ROWS)).logits.detach()
        model.unmerge_expert_vector()
        here |= learn(model, expert)
        notes[pattern]["share"] = sum(
            w.to_local().numel() if hasattr(w, "to_local") else 0 for w in model.parameters()
        )
        here["noticed"] = weights_change(model)
        found |= {f"{pattern}.{name}": tensor for name, tensor in here.items()}
        model.save_pretrained(folder / f"{pattern}-again")
    try:
        MambaFormerForCausalLM.from_pretrained(folder / "jamba", tp_plan="auto")
    except ValueError as error:
        notes["refused"] = str(error)
    return found, notes


def share_of(model):
    """Numbers in memory."""
    return sum((weight.to_local() if hasattr(weight, "to_local") else weight).numel() for weight in model.parameters())


@torch.no_grad()
def weights_change(model):
    """Logits of a text whose first half was cached before all split weights were halved; then they are as before."""
    ids = torch.tensor(ROWS)
    cache = model.make_cache()
    model(ids[:, :5], past_key_values=cache)
    split = [weight for weight in model.parameters() if hasattr(weight, "to_local")]
    for weight in split:
        weight.mul_(0.5)
    logits = model(ids[:, 5:], past_key_values=cache).logits
    for weight in split:
        weight.mul_(2)
    return logits


def start_of_training():
    """A model, and the rows of four texts that both processes train on together."""
    model = random_model(config_of("everything"), loudness=0.8).train()
    return model, torch.optim.SGD(model.parameters(), lr=0.05), torch.arange(4)[:, None] + torch.arange(10)


def sharded_data_parallel(folder):
    """Four steps of training with FSDP, each process on half of the texts; then the weights."""
    found, notes = {}, {}
    for wrap, classes in FSDP_WRAPS.items():
        AcceleratorState._reset_state(reset_partial_state=True)
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=classes
        )
        accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
        # Accelerate turns FSDP on by itself only where there is an accelerator; PyTorch's FSDP runs on CPUs.
        AcceleratorState._shared_state |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}
        model, optimizer, ids = start_of_training()
        model, optimizer = accelerator.prepare(model, optimizer)
        mine, losses = ids.chunk(2)[accelerator.process_index], []
        for _ in range(4):
            loss = model(mine, labels=mine).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(accelerator.reduce(loss.detach(), "mean").item())
        notes[wrap] = {"losses": losses, "share": share_of(model)}
        found |= {f"{wrap}.{name}": weight.full_tensor() for name, weight in model.named_parameters()}
    return found, notes


if __name__ == "__main__":
    folder, rank = Path(sys.argv[1]), os.environ["RANK"]
    os.environ["MAMBAFORMER_CACHE"] = str(folder / f"bases-{rank}")
    torch.distributed.init_process_group("gloo")
    # Set, it has `from_pretrained` leave the loading to FSDP. FSDP's plugin sets it again.
    os.environ.pop("ACCELERATE_USE_FSDP")
    tensors, notes = {}, {}
    for task in (tensor_parallel, sharded_data_parallel):
        more_tensors, more_notes = task(folder)
        tensors, notes = tensors | more_tensors, notes | more_notes
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, folder / f"{rank}.safetensors")
    (folder / f"{rank}.json").write_text(json.dumps(notes))
    torch.distributed.destroy_process_group()
