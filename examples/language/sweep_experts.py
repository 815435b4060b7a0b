"""What experts gain on a hybrid: by module family and by rank, and against LoRAs of equal bytes.

    python examples/language/sweep_experts.py                                   # all: about an hour on two cores
    python examples/language/sweep_experts.py --families-on python bible        # single families on both domains
    python examples/language/sweep_experts.py --steps 2 --trial-steps 1 --output /tmp/try --run-dir /tmp/try

All runs train on equally many tokens, in the same order. First their learning rates are chosen: for each size of the
expert of all modules and of the LoRA that equals it in bytes, by the same search over short runs on the first domain
(`--trial-steps`), scored on text that is kept back from training. Then come the runs themselves, several at a time
with one thread each, and EXPERTS.md and experts.png are written out of all that are done. What was cut off goes on
when it is started again: finished runs are kept. Needs the extra `train`.
"""

import argparse
import multiprocessing
import os
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import datasets
import torch
from tqdm.auto import tqdm
from transformers.utils import logging

from expert_report import write_report
from expert_runs import (
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
from texts import DOMAINS, collect
from train_expert import HYBRID, TEXTS, files_of
from training import make_once
from tuners import ALL, FAMILIES

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


def work(place: int, jobs: list[Job], next_job, sweep: Sweep, folder: Path, lock) -> None:
    """A process: takes one job after the other until none is left."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", ".*activation_checkpointing", FutureWarning)  # peft asks for the old name
    tqdm.set_lock(lock)
    bench = Bench(sweep, folder)
    while True:
        with next_job.get_lock():
            idx, next_job.value = next_job.value, next_job.value + 1
        if idx >= len(jobs):
            return
        complete_with_bar(jobs[idx], bench, place)


def complete_with_bar(job: Job, bench: Bench, place: int) -> None:
    """Shows how far each run is; ends the process if the one that started it is gone."""
    starter = multiprocessing.parent_process()
    with tqdm(desc="base", position=place, leave=False, mininterval=1.0) as bar:

        def report(step: int) -> None:
            if not starter.is_alive():
                sys.exit(1)
            bar.update(step - bar.n)

        def run(run: Run) -> dict:
            bar.set_description_str(f"{run.name:40s}", refresh=False)
            bar.reset(bench.sweep.trial_steps if run.is_trial else bench.sweep.steps)
            return complete(run, bench, report)

        if job is None:
            bench.base()
        elif job.is_trial:
            trials(job, lambda trial: loss_of_trial(run(trial)))
        else:
            run(job)


def run_all(jobs: list[Job], sweep: Sweep, folder: Path, num_workers: int) -> bool:
    """Does all jobs in so many processes; whether all of them succeeded."""
    context = multiprocessing.get_context("spawn")
    next_job, lock = context.Value("i", 0), context.RLock()
    workers = [
        context.Process(target=work, args=(place, jobs, next_job, sweep, folder, lock), daemon=True)
        for place in range(min(num_workers, len(jobs)))
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return all(worker.exitcode == 0 for worker in workers)


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
    parser.add_argument("--run-dir", type=Path, default=ROOT / "runs/experts", help="where results go")
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
    return Sweep(digest=digest_of(files_of(args.model)), model=args.model, **{n: getattr(args, n) for n in same})


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    sweep, folder = sweep_of(args), args.run_dir
    make_once(args.texts, collect)
    prepare(sweep, args.texts, folder)
    first = args.domains[0]
    print(f"learning rates: {3 * len(args.ranks)} searches of runs of {sweep.trial_steps} steps", flush=True)
    if not run_all(searches(args.ranks, first), sweep, folder, args.workers):
        return 1
    runs = [
        replace(chosen(replace(run, domain=first), sweep, folder), domain=run.domain)
        for run in finals(args.ranks, args.domains, args.families_on)
    ]
    missing = [run for run in runs if run.result(sweep, folder) is None]
    print(f"{len(runs)} runs of {sweep.tokens:,} tokens, {len(missing)} of them to be done", flush=True)
    succeeded = run_all(missing, sweep, folder, args.workers)
    print(write_report(runs, sweep, folder, args.output))
    return 0 if succeeded else 1


if __name__ == "__main__":
    sys.exit(main())
