"""Random programs on caches of random small models: whatever was done before, every logit is the oracle's.

Hypothesis draws programs of operations (one rule each) on a pool of live caches that two models of one configuration
serve. `world.py` says what each cache ought to hold: for each row its columns, each a pad or a token with what encoded
it (an expert and the weights of that moment), so the oracle in `reference.py` can read the row anew. Every forward is
compared with it at 1e-10 of the logit scale; what must be refused must leave everything as it was. At the end of a
program every cache is fed once more.

CI runs the same 20,000 operations every time, and the gate 5,000 of them. `make test-long` (that is,
`MACHINE_OPS=200000 pytest tests/test_state_machine.py`) runs others, as many as that, from a seed that it prints;
`MACHINE_SEED=...` repeats them. A failure is shrunk to a short program and printed as one.
"""

import copy
import itertools
import os
import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from machine import KEEP, MOST_ROWS, Machine, below, one_of
from mambaformer import MambaFormerCache
from world import (
    BAD_INPUTS,
    BASE,
    Ledger,
    PowerCut,
    Saved,
    Slot,
    Verdict,
    as_tensors,
    can_be_saved,
    can_record_more,
    can_train,
    descend,
    has_room_and_text,
    power_cut_at,
)

OPERATIONS = int(os.environ.get("MACHINE_OPS", 20_000))
FIRST_SEED = int(os.environ.get("MACHINE_SEED", random.randrange(10**6) if "MACHINE_OPS" in os.environ else 0))
NUM_ITEMS, NUM_IN_THE_GATE = 16, 4
ITEMS = [pytest.param(n, marks=[pytest.mark.long] if n >= NUM_IN_THE_GATE else []) for n in range(NUM_ITEMS)]
STEPS_OF_A_PROGRAM = 60


class CacheMachine(Machine):
    """The rules. Subclasses count operations by kind in `tally` and draw models from `families`."""

    # ---- feeding

    @precondition(Machine.has_room)
    @rule(data=st.data())
    def feed(self, data):
        slot = self.pick(data, lambda slot: slot.room)
        mode = data.draw(one_of(("no_grad", "no_grad", "inference", "grad")))
        turn = self.draw_turn(data, slot)
        kept = data.draw(one_of((0, 0, 1, 2, "first", "last twice")))
        kept = {"first": torch.tensor([0]), "last twice": torch.tensor([-1, -1])}.get(kept, kept)
        self.say("feed", slot, turn, mode, "logits_to_keep", kept)
        self.forward(slot, turn, mode=mode, logits_to_keep=kept)
        self.did()

    @precondition(Machine.has_room)
    @rule(data=st.data())
    def feed_with_pads(self, data):
        slot = self.pick(data, lambda slot: slot.room)
        mode = data.draw(one_of(("no_grad", "no_grad", "inference", "grad")))
        turn, is_whole = self.draw_turn(data, slot, has_pads=True), data.draw(st.booleans())
        self.say("feed with pads", slot, turn, mode, "mask of", "all" if is_whole else "new tokens")
        self.forward(slot, turn, mode=mode, whole_mask=is_whole)
        self.did()

    @precondition(Machine.has_room)
    @rule(data=st.data())
    def feed_one_by_one(self, data):
        slot = self.pick(data, lambda slot: slot.room)
        mode = data.draw(one_of(("no_grad", "no_grad", "inference")))
        for _ in range(min(slot.room, 1 + data.draw(below(4)))):
            turn = self.draw_turn(data, slot, widest=1, has_pads=data.draw(one_of((False, False, True))))
            self.say("feed one", slot, turn, mode)
            self.forward(slot, turn, mode=mode)
            self.did()

    @precondition(Machine.has_room)
    @rule(data=st.data())
    def feed_under_an_expert(self, data):
        slot = self.pick(data, lambda slot: slot.room)
        turn = self.draw_turn(data, slot, has_pads=data.draw(st.booleans()))
        expert, spelling = self.draw_expert(data, len(turn))
        self.say("feed under", slot, expert, turn)
        self.forward(slot, turn, expert, spelling)
        self.did()

    @precondition(Machine.has_room)
    @rule(data=st.data())
    def feed_embeddings(self, data):
        slot = self.pick(data, lambda slot: slot.room)
        turn = self.draw_turn(data, slot, has_pads=data.draw(st.booleans()))
        self.say("feed inputs_embeds", slot, turn)
        self.forward(slot, turn, is_embedded=True)
        self.did()

    @precondition(lambda self: not self.family.storage)
    @rule(data=st.data())
    def feed_nobody(self, data):
        """A forward without a cache disturbs none; what it computes is known where caches keep all as it is."""
        model, width = self.models[data.draw(below(2))], 1 + data.draw(below(4))
        slot = Slot("nobody", None, Ledger("recompute"), model, home=model)
        turn = self.draw_turn(data, slot, widest=width, has_pads=True)
        expert, spelling = (BASE, KEEP) if model.merged else self.draw_expert(data, len(turn))
        self.say("feed without a cache", slot, expert, turn)
        ids, mask = as_tensors(turn)
        options = {} if spelling is KEEP else {"expert_vector": spelling}
        with torch.no_grad():
            logits = model.module(ids, attention_mask=mask.long(), use_cache=False, **options).logits
        slot.ledger.take_in(model, expert, turn)
        self.compare(slot, turn, logits, 0)
        self.did()

    # ---- taking back

    def draw_depth(self, data, slot):
        """Columns to take back: mostly a few."""
        most = slot.ledger.num_columns
        return data.draw(below(min(most, data.draw(one_of((3, 8, most)))) + 1))

    def take_back(self, slot, counts, given):
        if self.attempt(slot, slot.ledger.of_crop(counts), lambda: slot.cache.crop(given))[0]:
            slot.ledger.crop(counts)

    @precondition(Machine.any_slot)
    @rule(data=st.data())
    def crop(self, data):
        slot = self.pick(data)
        for _ in range(data.draw(one_of((1, 1, 2, 3)))):
            if slot.ledger.rows:
                depth = self.draw_depth(data, slot)
                self.say("crop", slot, -depth)
                self.take_back(slot, [depth] * len(slot.ledger.rows), -depth)
                self.did()
        self.perhaps_go_on(data, slot)

    @precondition(Machine.any_slot)
    @rule(data=st.data())
    def crop_each_row(self, data):
        slot = self.pick(data)
        counts = [self.draw_depth(data, slot) for _ in slot.ledger.rows]
        given = [-count for count in counts]
        given = torch.tensor(given) if data.draw(st.booleans()) else given
        self.say("crop rows", slot, given)
        self.take_back(slot, counts, given)
        self.did()
        self.perhaps_go_on(data, slot)

    @precondition(lambda self: self.any_slot(can_record_more))
    @rule(data=st.data())
    def record_past(self, data):
        slot = self.pick(data, can_record_more)
        reach = slot.cache.rollback_reach + 1 + data.draw(below(3))
        self.say("activate_past_recording", slot, reach)
        slot.cache.activate_past_recording(reach)
        self.did()
        self.perhaps_go_on(data, slot)

    @precondition(Machine.any_slot)
    @rule(data=st.data())
    def reset(self, data):
        slot = self.pick(data)
        self.say("reset", slot)
        slot.cache.reset()
        slot.ledger.forget()
        self.did()
        self.perhaps_go_on(data, slot)

    # ---- rows and copies

    @precondition(Machine.any_slot)
    @rule(data=st.data())
    def reorder(self, data):
        slot = self.pick(data)
        num_rows = len(slot.ledger.rows)
        rows = [data.draw(below(num_rows)) for _ in range(num_rows)]
        self.say("reorder_cache", slot, rows)
        slot.cache.reorder_cache(torch.tensor(rows))
        slot.ledger.select_rows(rows)
        self.did()
        self.perhaps_go_on(data, slot)

    @precondition(lambda self: self.any_slot(lambda slot: 0 < len(slot.ledger.rows) <= MOST_ROWS // 2))
    @rule(data=st.data())
    def repeat(self, data):
        slot = self.pick(data, lambda slot: 0 < len(slot.ledger.rows) <= MOST_ROWS // 2)
        num_rows = len(slot.ledger.rows)
        times = 1 + data.draw(below(MOST_ROWS // num_rows))
        self.say("batch_repeat_interleave", slot, times)
        slot.cache.batch_repeat_interleave(times)
        slot.ledger.select_rows([row for row in range(num_rows) for _ in range(times)])
        self.did()
        self.perhaps_go_on(data, slot)

    @precondition(Machine.any_slot)
    @rule(data=st.data())
    def select(self, data):
        slot = self.pick(data)
        num_rows = len(slot.ledger.rows)
        rows = [data.draw(below(num_rows)) for _ in range(1 + data.draw(below(MOST_ROWS)))]
        form = data.draw(one_of(("batch_select_indices", "a boolean mask", "select_rows")))
        self.say(form, slot, rows)
        if form == "select_rows":
            slot.cache.select_rows(torch.tensor(rows))
        elif form == "batch_select_indices":
            slot.cache.batch_select_indices(torch.tensor(rows))
        else:
            slot.cache.batch_select_indices(torch.tensor([row in rows for row in range(num_rows)]))
            rows = sorted(set(rows))
        slot.ledger.select_rows(rows)
        self.did()
        self.perhaps_go_on(data, slot)

    @rule(data=st.data())
    def fork(self, data):
        slot, form = self.pick(data, lambda slot: True), data.draw(one_of(("fork", "deepcopy")))
        cache = slot.cache.fork() if form == "fork" else copy.deepcopy(slot.cache)
        other = replace(slot, name=next(self.names), cache=cache, ledger=slot.ledger.copy())
        self.add_slot(data, other)
        self.say(form, slot, "into", other.name)
        self.did()
        self.perhaps_go_on(data, other, slot)

    @precondition(lambda self: self.any_slot(can_be_saved))
    @rule(data=st.data())
    def save(self, data):
        slot = self.pick(data, can_be_saved)
        path = f"{self.folder.name}/{len(self.saved)}.safetensors"
        self.say("save", slot, path)
        slot.cache.save(path)
        self.saved.append(Saved(path, slot.ledger.saved_by(slot.model), slot.model.weights))
        self.did()
        self.perhaps_go_on(data, slot)

    @precondition(lambda self: self.saved)
    @rule(data=st.data())
    def load(self, data):
        """Into any model; other weights are refused, or the text is encoded again by them."""
        saved, model = self.saved[-1 - data.draw(below(len(self.saved)))], self.models[data.draw(below(2))]
        how = data.draw(one_of(("error", "recompute")))
        self.say("load", None, saved.path, "for", model, how)
        self.did()
        try:
            if data.draw(st.booleans()):
                cache = model.module.load_cache(saved.path, on_weights_change=how)
            else:
                cache = MambaFormerCache.load(saved.path, model.module, on_weights_change=how)
        except ValueError as refusal:
            assert model.weights != saved.weights, refusal
            return
        ledger = saved.ledger.copy()
        ledger.was_loaded_by(model, is_encoded_again=how == "recompute" and model.weights != saved.weights)
        slot = Slot(next(self.names), cache, ledger, model, home=model)
        self.add_slot(data, slot)
        self.perhaps_go_on(data, slot)

    @rule(data=st.data())
    def make_cache(self, data):
        self.add_cache(data)
        self.did()

    @rule(data=st.data())
    def hand_over(self, data):
        """The other model of the same configuration serves the cache from here on."""
        slot = self.pick(data, lambda slot: True)
        slot.model = self.models[1 - slot.model.which]
        self.say("is handed over", slot)
        self.did()
        self.perhaps_go_on(data, slot)

    # ---- experts and weights

    @rule(data=st.data())
    def set_expert_vector(self, data):
        slot = self.pick(data, lambda slot: True)
        expert, spelling = self.draw_expert(data, len(slot.ledger.rows))
        self.say("set_expert_vector", slot, expert)
        verdict = slot.ledger.of_set_expert(expert)
        if self.attempt(slot, verdict, lambda: slot.cache.set_expert_vector(spelling))[0]:
            slot.ledger.set_expert_vector(expert)
        self.did()
        self.perhaps_go_on(data, slot)

    @rule(data=st.data())
    def merge_or_unmerge(self, data):
        model = self.models[data.draw(below(2))]
        if model.merged is not None:
            self.say("unmerge_expert_vector on", None, model)
            model.module.unmerge_expert_vector()
            content, model.merged = model.content, None
            model.weights_changed()
            assert model.content == content, "unmerging did not restore the weights bit for bit"
        else:
            model.merged = data.draw(one_of(tuple(label for label in self.family.experts if label != BASE)))
            self.say("merge_expert_vector on", None, model, model.merged)
            model.module.merge_expert_vector(self.spell(data, model.merged))
            model.weights_changed()
        self.did()
        self.perhaps_go_on(data, *(slot for slot in self.slots if slot.model is model))

    def unmerged(self):
        return [model for model in self.models if model.merged is None]

    def pick_unmerged(self, data):
        return self.unmerged()[data.draw(below(len(self.unmerged())))]

    @precondition(unmerged)
    @rule(data=st.data())
    def load_state_dict(self, data):
        model, which = self.pick_unmerged(data), data.draw(below(2))
        self.say("load_state_dict on", None, model, f"the weights that model{which} started with")
        model.module.load_state_dict(model.originals[which])
        model.weights_changed()
        self.did()
        self.perhaps_go_on(data, *(slot for slot in self.slots if slot.model is model))

    @precondition(unmerged)
    @rule(data=st.data())
    def round_trip(self, data):
        model = self.pick_unmerged(data)
        self.say("to(float32) and back on", None, model)
        model.module.to(torch.float32)
        model.module.to(torch.float64)
        model.weights_changed()
        self.did()
        self.perhaps_go_on(data, *(slot for slot in self.slots if slot.model is model))

    @precondition(lambda self: self.unmerged() and self.any_slot(can_train))
    @rule(data=st.data())
    def train(self, data):
        """A step of SGD on a loss of tokens that a live cache takes in."""
        slot = self.pick(data, can_train)
        model = slot.model
        turn = self.draw_turn(data, slot, has_pads=data.draw(st.booleans()))
        self.say("train on", slot, turn)
        logits = self.forward(slot, turn, mode="grad")
        if logits is not None and logits.requires_grad:
            descend(model.module, -logits.log_softmax(-1)[..., 0].mean())
            model.weights_changed()
        self.did()
        self.perhaps_go_on(data, *(slot for slot in self.slots if slot.model is model))

    # ---- what must be refused

    @precondition(Machine.any_slot)
    @rule(data=st.data())
    def refuse(self, data):
        """Bad input raises and changes nothing."""
        slot = self.pick(data)
        what, call = BAD_INPUTS[data.draw(below(len(BAD_INPUTS)))]
        self.say("bad input:", slot, what)
        with torch.no_grad():
            self.attempt(slot, Verdict.REFUSES, lambda: call(self.family, slot), (ValueError, TypeError, IndexError))
        self.did()
        self.perhaps_go_on(data, slot)

    @precondition(lambda self: self.any_slot(has_room_and_text))
    @rule(data=st.data())
    def interrupt(self, data):
        """A forward that fails half way, as for want of memory, was never begun."""
        slot = self.pick(data, has_room_and_text)
        turn = self.draw_turn(data, slot, has_pads=data.draw(st.booleans()))
        expert, spelling = self.draw_expert(data, len(turn))
        stack = slot.model.module.model
        parts = [stack.norm, *(part for layer in stack.layers for part in layer.children())]
        part = parts[data.draw(below(len(parts)))]
        self.say("fails half way:", slot, expert, turn, "at", type(part).__name__)
        ids, mask = as_tensors(turn)
        options = {"attention_mask": mask.long(), "past_key_values": slot.cache, "expert_vector": spelling}
        with torch.no_grad(), power_cut_at(part):
            self.attempt(
                slot, Verdict.REFUSES, lambda: slot.model.module(ids, **options), (PowerCut, ValueError, TypeError)
            )
        self.did()
        self.perhaps_go_on(data, slot)

    @precondition(lambda self: self.any_slot(lambda slot: slot.ledger.limit))
    @rule(data=st.data())
    def overflow(self, data):
        """Static storage takes no more columns than it was made for."""
        slot = self.pick(data, lambda slot: slot.ledger.limit)
        num_columns = slot.ledger.limit - slot.ledger.num_columns + 1 + data.draw(below(3))
        turn = [[1] * num_columns for _ in slot.ledger.rows or [0]]
        self.say("overflow", slot, num_columns)
        assert self.forward(slot, turn) is None
        self.did()
        self.perhaps_go_on(data, slot)

    @invariant()
    def every_cache_shows_what_it_ought_to_hold(self):
        for slot in self.slots:
            ledger, cache = slot.ledger, slot.cache
            assert cache.get_seq_length() == ledger.num_columns
            assert cache.batch_size == (len(ledger.rows) or -1)


# ------------------------------------------------------------------------------------------------------ which caches

# -------------------------------------------------------------------------------------------------------- the test


@pytest.mark.parametrize("item", ITEMS)
def test_whatever_was_done_before_every_logit_is_the_oracles(item):
    wanted = -(-OPERATIONS // NUM_ITEMS)
    tally, rounds = Counter(), itertools.count()
    print(f"MACHINE_SEED={FIRST_SEED}")
    while (done := sum(tally.values())) < wanted:
        number = (FIRST_SEED * NUM_ITEMS + item) * 1000 + next(rounds)
        members = {"tally": tally, "families": range(4 * number, 4 * number + 4)}
        machine = seed(number)(type("CacheProgram", (CacheMachine,), members))
        run_state_machine_as_test(machine, settings=program_settings(wanted - done))
    print(dict(tally))
    assert sum(tally.values()) >= wanted


def program_settings(num_operations):
    """Programs for about as many operations, and at most 100 programs, so that models change."""
    return settings(
        max_examples=max(1, min(100, num_operations // STEPS_OF_A_PROGRAM)),
        stateful_step_count=STEPS_OF_A_PROGRAM,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
        database=None,
        deadline=None,
    )
