"""Measures the gain of expert vectors on a hybrid by module family and rank, and of LoRAs of equal bytes.

    python -m recipes.language.sweep_experts                                   # all: about an hour on two cores
    python -m recipes.language.sweep_experts --families-on python bible        # single families on both domains
    python -m recipes.language.sweep_experts --steps 2 --trial-steps 1 --output /tmp/try --run-dir /tmp/try

All runs train on equally many tokens, in the same order. First their learning rates are chosen: for each size of the
expert of all modules and of the LoRA that equals it in bytes, by the same search over short runs on the first domain
(`--trial-steps`), scored on text that is kept back from training. Then come the runs themselves, several at a time
with one thread each, and EXPERTS.md and experts.png are written out of all that are done. What was cut off goes on
when it is started again: finished runs are kept. Needs the extra `train`.
"""

import argparse
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import datasets
from transformers.utils import logging

from recipes.language.expert_report import write_report
from recipes.language.expert_runs import (
    EXPERT,
    LORA,
    LORA_FAMILIES,
    Bench,
    Run,
    Sweep,
    chosen,
    complete,
    digest_of,
    loss_of_trial,
    prepare,
    trials,
)
from recipes.language.texts import DOMAINS, collect
from recipes.language.train_expert import HYBRID, TEXTS, files_of
from recipes.language.training import make_once
from recipes.language.tuners import ALL, FAMILIES
from recipes.sweeps import Progress, run_all

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent.parent
FULL = "full"
UNKNOWN = 0.0  # the rate of a run for which none is chosen yet

Job = Run | None  # None: the losses of the base; a trial: the search for the rate of this run


def searches(ranks: list[int | None], domain: str) -> list[Job]:
    """The base, and a search for each size of either method, of the LoRA for each place that it may be put."""
    kinds = [(EXPERT, ALL), *((LORA, family) for family in LORA_FAMILIES)]
    found = [Run(method, family, rank, domain, UNKNOWN, is_trial=True) for rank in ranks for method, family in kinds]
    return [None, *found]


def finals(ranks: list[int | None], domains: list[str], families_on: list[str]) -> list[Run]:
    """Experts of all modules and LoRAs on all domains; experts of one family on `families_on`."""
    whole = [(method, ALL, domain) for domain in domains for method in (EXPERT, LORA)]
    single = [(EXPERT, family, domain) for domain in families_on for family in FAMILIES]
    return [Run(method, family, rank, domain, UNKNOWN) for rank in ranks for method, family, domain in whole + single]


def worker(sweep: Sweep, folder: Path) -> Callable[[Job, Progress], None]:
    """The function of a worker process: runs a job on a model that it loads once, and shows its progress."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", ".*activation_checkpointing", FutureWarning)  # peft asks for the old name
    bench = Bench(sweep, folder)

    def do(job: Job, progress: Progress) -> None:
        def result(run: Run) -> dict:
            progress.begin(run.name, sweep.trial_steps if run.is_trial else sweep.steps)
            return complete(run, bench, progress.at)

        if job is None:
            progress.begin("base")
            bench.base()
        elif job.is_trial:
            trials(job, lambda trial: loss_of_trial(result(trial)))
        else:
            result(job)

    return do


def _rank(text: str) -> int | None:
    return None if text == FULL else int(text)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=HYBRID, help=f"{HYBRID!r}, or a folder of a hybrid")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"], help="of the frozen weights")
    parser.add_argument("--ranks", nargs="+", type=_rank, default=[None, 256, 64, 16], metavar="RANK",
                        help="scales a matrix, or 'full'")  # fmt: skip
    parser.add_argument("--domains", nargs="+", choices=DOMAINS, default=["python", "bible"])
    parser.add_argument("--families-on", nargs="*", choices=DOMAINS, default=["python"], help="one family at a time")
    parser.add_argument("--steps", type=int, default=32, help="of a run, one block each")
    parser.add_argument("--trial-steps", type=int, default=10, help="of a run that a learning rate is chosen by")
    parser.add_argument("--length", type=int, default=512, help="tokens of a block")
    parser.add_argument("--held-out-blocks", type=int, default=8, help="of each domain")
    parser.add_argument("--trial-blocks", type=int, default=4, help="kept back from training to choose rates by")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at a time, with one thread each")
    parser.add_argument("--texts", type=Path, default=TEXTS, help="folder of the domains; made if it is not there")
    parser.add_argument(
        "--run-dir", type=Path, default=ROOT / "runs/experts", help="where results go, a folder for each sweep"
    )
    parser.add_argument("--output", type=Path, default=FOLDER, help="where EXPERTS.md and experts.png go")
    args = parser.parse_args(argv)
    try:
        files_of(args.model)
    except ValueError as error:
        parser.error(str(error))
    if args.trial_steps > args.steps:
        parser.error("--trial-steps must be at most --steps")
    for name in ("steps", "trial_steps", "held_out_blocks", "trial_blocks", "workers"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return args


def sweep_of(args: argparse.Namespace) -> Sweep:
    same = ("dtype", "length", "steps", "trial_steps", "held_out_blocks", "trial_blocks")
    contents = {"weights": digest_of(files_of(args.model)), "text": digest_of(sorted(args.texts.glob("*.jsonl")))}
    return Sweep(model=args.model, **contents, **{name: getattr(args, name) for name in same})


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    make_once(args.texts, collect)
    sweep = sweep_of(args)
    folder = sweep.folder(args.run_dir)
    prepare(sweep, args.texts, folder)
    first = args.domains[0]
    print(f"learning rates: {3 * len(args.ranks)} searches of runs of {sweep.trial_steps} steps", flush=True)
    start = partial(worker, sweep, folder)
    if not run_all(searches(args.ranks, first), start, args.workers):
        return 1
    runs = [
        replace(chosen(replace(run, domain=first), sweep, folder), domain=run.domain)
        for run in finals(args.ranks, args.domains, args.families_on)
    ]
    missing = [run for run in runs if run.result(sweep, folder) is None]
    print(f"{len(runs)} runs of {sweep.tokens:,} tokens, {len(missing)} of them to be done", flush=True)
    succeeded = run_all(missing, start, args.workers)
    print(write_report(runs, sweep, folder, args.output))
    return 0 if succeeded else 1


if __name__ == "__main__":
    sys.exit(main())
