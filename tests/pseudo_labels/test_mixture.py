"""Which slots of a batch are of which kind, what the two streams show, what the targets are."""

import dataclasses
import itertools
import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from selections import a_selection
from torch import nn
from torch.nn import functional as F

from lambdanets.data.batches import Batch
from lambdanets.data.transforms import mix
from lambdanets.errors import BadRecipe
from lambdanets.pseudo_labels.mixture import JointDraws, Slot, hard_targets, labelled_before, mixed, soft_targets
from lambdanets.pseudo_labels.selection import Selection
from lambdanets.pseudo_labels.task import Joint, classes_in
from lambdanets.recipes import choose
from lambdanets.recipes.pseudo_labels import Mixture
from lambdanets.training.distributed import Ranks
from lambdanets.training.learner import Learner
from lambdanets.training.task import Place


def draws(n=50, batch=6, labelled=3, rows=range(7), seed=0):
    """The draws of a selection of which nothing but the rows is known."""
    return JointDraws(n, batch, seed, labelled, Selection(*[None] * 7, row=np.array(rows, np.uint32)))


def labelled_slots(batch, labelled):
    return [i for i in range(batch) if labelled_before(i + 1, labelled, batch) > labelled_before(i, labelled, batch)]


def test_the_labelled_slots_of_a_batch_are_those_of_the_rule():
    assert (Mixture().labelled(6), labelled_slots(6, 3)) == (3, [1, 3, 5])
    assert (Mixture(ratio=3).labelled(8), labelled_slots(8, 2)) == (2, [3, 7])
    assert Mixture(ratio=14).labelled(4096) == 273
    assert (Mixture(ratio=100).labelled(4), Mixture(ratio=0.01).labelled(4)) == (1, 3)  # one of either kind at least
    kinds = [slot.draw < 0 for slot in draws(batch=8, labelled=2).slots(0, 0, range(8))]
    assert [i for i, labelled in enumerate(kinds) if labelled] == [3, 7]


def test_every_part_of_every_rank_has_both_kinds_in_proportion_to_within_one():
    for batch, ranks, parts in itertools.product(range(2, 65), range(1, 5), range(1, 5)):
        cuts = set()  # as ranks, and then `tensor_split`, cut a batch
        for rank in range(ranks):
            start, stop = rank * batch // ranks, (rank + 1) * batch // ranks
            ends = torch.arange(start, stop).tensor_split(parts) if stop > start else ()
            cuts |= {(int(part[0]), int(part[-1]) + 1) for part in ends if len(part)}
        for labelled, (start, stop) in itertools.product(range(1, batch), cuts):
            found = labelled_before(stop, labelled, batch) - labelled_before(start, labelled, batch)
            assert abs(found - (stop - start) * labelled / batch) < 1


def test_a_batch_goes_over_the_end_of_a_pass_and_each_pass_shows_every_draw_once():
    three = draws(rows=range(7))
    shown = [slot for step in range(7) for slot in three.slots(0, step, range(6)) if slot.draw >= 0]
    assert [slot.draw for slot in shown] == list(range(21))
    assert [slot.draw % 7 for slot in shown[6:9]] == [6, 0, 1]  # step 2: place 6 of pass 0, then 0 and 1 of pass 1
    passes = [[slot.id - 50 for slot in shown[start : start + 7]] for start in (0, 7, 14)]
    assert [sorted(each) for each in passes] == [list(range(7))] * 3
    assert len({tuple(each) for each in passes}) == 3  # each in an order of its own
    big = draws(batch=40, labelled=3, rows=range(7))  # 37 draws a step of 7: five passes and more
    first = Counter(slot.id for slot in big.slots(0, 0, range(40)) if slot.draw >= 0)
    assert sorted(first.values()) == [5] * 5 + [6] * 2


def test_the_labelled_stream_is_that_of_a_run_without_a_selection_of_the_same_labelled_batch():
    from lambdanets.data.reading import Draws

    alone, both = Draws(50, 3, 0), draws()
    assert len(alone) == len(both) == 16
    for epoch, step in ((0, 0), (1, 15)):
        slots = [slot for slot in both.slots(epoch, step, range(6)) if slot.draw < 0]
        assert [slot.id for slot in slots] == alone.slots(epoch, step, range(3))
        assert [both.augments(epoch, s) for s in slots] == [alone.augments(epoch, s.id) for s in slots]
        assert both.candidate(epoch, slots[0], 2) == alone.candidate(epoch, slots[0].id, 2)


@pytest.mark.parametrize("ranks", [1, 2, 4, 1024])
def test_any_number_of_ranks_has_the_slots_of_one(ranks):
    world = draws(n=9000, batch=4096, labelled=273, rows=range(10_000))
    for epoch, step in ((0, 0), (2, 31)):
        whole = world.slots(epoch, step, range(4096))
        parts = [range(r * 4096 // ranks, (r + 1) * 4096 // ranks) for r in range(ranks)]
        assert [slot for part in parts for slot in world.slots(epoch, step, part)] == whole
        assert sum(slot.draw < 0 for slot in whole) == 273
        assert len({slot.id for slot in whole if slot.draw < 0}) == 273


def test_copies_of_a_picture_draw_differently_and_have_substitutes_of_their_own():
    copies = draws(rows=[0] * 7)
    slots = [slot for slot in copies.slots(0, 0, range(6)) if slot.draw >= 0]
    assert {slot.id for slot in slots} == {50}
    assert len({copies.augments(0, slot) for slot in slots}) == 3
    many = draws(rows=range(1000))
    first, second = Slot(50, 0), Slot(50, 1)
    assert many.candidate(0, first, 0) == many.candidate(0, second, 0) == 50
    stand_ins = [[many.candidate(0, slot, attempt) for attempt in range(1, 9)] for slot in (first, second)]
    assert stand_ins[0] != stand_ins[1]
    assert min(map(min, stand_ins)) >= 50  # never a labelled picture in the stead of one without a label


def test_what_was_not_kept_of_the_probabilities_is_spread_evenly():
    kept = torch.tensor([[0, 1]]), torch.tensor([[0.6, 0.3]], dtype=torch.float64)
    targets = soft_targets(*kept, classes=5)
    torch.testing.assert_close(targets, torch.tensor([[0.6, 0.3, *[0.1 / 3] * 3]], dtype=torch.float64))
    warm = soft_targets(*kept, classes=5, temperature=2)
    assert warm[0].tolist() == pytest.approx([0.4142, 0.2929, *[0.0976] * 3], abs=1e-4)
    rounded = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float16).double()  # of all classes: only divided by the sum
    full = soft_targets(torch.tensor([[2, 0, 1]]), rounded, classes=3)
    torch.testing.assert_close(full, rounded[:, [1, 2, 0]] / rounded.sum())
    above = soft_targets(torch.tensor([[0, 1]]), torch.tensor([[0.75, 0.2505]]), classes=4)  # float16 rounds up, too
    assert above.min() == 0
    assert above.sum().item() == pytest.approx(1)
    unsure = torch.tensor([[2, 0], [1, 3]]), torch.tensor([[0.1, 0.05], [0.1, 0.1]])
    cold = soft_targets(*unsure, classes=40, temperature=0.001)  # the coldest that is allowed, in float32
    assert cold[0, 2] == 1
    assert cold[1, [1, 3]].tolist() == [0.5, 0.5]
    assert cold.sum(dim=1).tolist() == [1, 1]


def test_hard_targets_are_smoothed_as_cross_entropy_smooths():
    logits, labels = torch.randn(9, 5, dtype=torch.float64), torch.randint(5, (9,))
    targets = hard_targets(labels, classes=5, smoothing=0.1, dtype=torch.float64)
    want = F.cross_entropy(logits, labels, label_smoothing=0.1, reduction="none")
    torch.testing.assert_close(F.cross_entropy(logits, targets, reduction="none"), want, rtol=1e-12, atol=1e-12)


def test_mixed_targets_are_those_of_mixing_labels():
    images, labels = torch.rand(7, 3, 8, 8), torch.tensor([0, 1, 2, 3, 0, 1, 2])
    for how in ({"mixup_alpha": 0.4, "cutmix_alpha": 0.0}, {"mixup_alpha": 0.0, "cutmix_alpha": 1.0}):
        want = mix(images, labels, classes=4, seed=3, step=5, **how)
        found = mixed(images, F.one_hot(labels, 4).float(), seed=3, step=5, **how)
        torch.testing.assert_close(found[0], want[0], rtol=0, atol=0)
        torch.testing.assert_close(found[1], want[1])


def test_exp_of_the_entropy_counts_classes():
    assert classes_in([4] * 10) == pytest.approx(10)
    assert classes_in([0, 0]) == 0
    assert 1 < classes_in([99, 1]) < 1.1


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"ratio": 0.0}, "pseudo_ratio must be in 0.001 to 1,000, not 0.0"),
        ({"temperature": float("inf")}, "pseudo_temperature must be"),
        ({"labels": "none"}, "pseudo_labels must be 'soft' or 'hard'"),
        ({"labels": "hard", "temperature": 2.0}, "hard labels have none"),
    ],
)
def test_a_mixture_that_cannot_be_is_refused(how, said):
    with pytest.raises(BadRecipe, match=said):
        Mixture(**how)


def test_the_largest_batch_that_fits_is_named_right():
    for ratio, images in itertools.product((0.3, 1, 3, 14), (1, 2, 24, 1000)):
        fits = Mixture(ratio=ratio).fits(images)
        assert Mixture(ratio=ratio).labelled(fits) <= images
        assert all(Mixture(ratio=ratio).labelled(fits + more) > images for more in range(1, 4))


# --- what a step computes ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def opened(shared_colours, unlabelled_shards, tmp_path_factory):
    """A task whose pictures are there, of a recipe."""
    selection = a_selection(tmp_path_factory.mktemp("selection") / "s", unlabelled_shards)

    def of(mixture, **changes):
        recipe = choose("folder", model="lambda_resnet_tiny", image_px=8, epochs=2, batch_images=8)
        recipe = dataclasses.replace(recipe, **{"ema_decay": 0.0, "drop_rate": 0.0, **changes})
        task = Joint(recipe, shared_colours, selection, mixture, unchecked_overlap=True, workers=0, seed=0)
        task.open()
        task.make_batches(tmp_path_factory.mktemp("run"), Ranks.alone())
        return task

    return of


@pytest.mark.parametrize("labels", ["soft", "hard"])
def test_the_loss_of_a_batch_is_that_of_its_slots(labels, opened):
    task = opened(Mixture(labels=labels), precision="float64", accumulation=3)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 3)).double()
    selection, place = task._selection, Place(torch.device("cpu"), torch.float64)
    for batch in itertools.islice(task.train.epoch(0), 3):
        parts = task.parts(batch, place, step=0)
        found = [task.loss(model, part) for part in parts]
        logits = model(batch.images.double())
        want, agree = [], 0
        for one, label, index in zip(logits, batch.labels, batch.ids, strict=True):
            row = index - 24
            if row < 0 or labels == "hard":
                want.append(F.cross_entropy(one, label, label_smoothing=0.1))
            else:
                kept = selection.top_prob[row].astype(np.float64)
                target = torch.full((3,), 1 - kept.sum(), dtype=torch.float64)
                target[torch.from_numpy(selection.top_class[row].astype(int))] = torch.from_numpy(kept)
                entropy = torch.special.entr(target).sum()
                want.append(F.kl_div(one.log_softmax(0), target, reduction="sum") + entropy)
            assert row < 0 or label == selection.label[row]
            agree += int(row >= 0 and one.argmax() == label)
        torch.testing.assert_close(sum(f.loss for f in found), sum(want), rtol=1e-9, atol=1e-9)
        counts = {name: sum(f.counts[name] for f in found) for name in found[0].counts}
        pseudo = [i for i, index in enumerate(batch.ids) if index >= 24]
        assert (counts["labelled"], counts["pseudo"], counts["agree"]) == (4, 4, agree)
        assert counts["predicted"].tolist() == np.bincount(logits.argmax(1)[pseudo], minlength=3).tolist()
        torch.testing.assert_close(counts["loss_pseudo"], sum(want[i] for i in pseudo).detach(), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(counts["loss_pseudo"] + counts["loss_labelled"], sum(want).detach())


def test_twenty_steps_are_those_of_noisy_students_sums_and_rate(opened):
    """(sum over both kinds) / labelled at a rate for the labelled, against our mean over both at a rate for both."""
    mixture = Mixture(ratio=3)
    task = opened(mixture, precision="float64", weight_decay=0.0, batch_norm="frozen", lr_per_256=2.0)
    recipe, device = task.recipe, torch.device("cpu")
    torch.manual_seed(1)
    ours = Learner(recipe, task, batch_images=8, seed=0, device=device, ranks=Ranks.alone())
    ours.parallelise()
    torch.manual_seed(1)
    theirs = task.create_model().double()
    for model in (ours.model, theirs):
        model.eval()  # batch norm as it is: both forms see a batch at once either way
    torch.testing.assert_close(theirs.state_dict(), ours.model.state_dict(), rtol=0, atol=0)
    begun = [p.detach().clone() for p in theirs.parameters()]
    labelled = mixture.labelled(8)
    sgd = torch.optim.SGD(theirs.parameters(), lr=recipe.lr_per_256 * labelled / 256, momentum=recipe.momentum)
    batches = [batch for epoch in range(2) for batch in task.train.epoch(epoch)][:20]
    assert (labelled, len(batches)) == (2, 20)
    for step, batch in enumerate(batches):
        ours.apply(step, recipe.peak_lr, ours.gradients(batch, step).norm)
        (part,) = task.parts(batch, ours.place, step=step)
        losses = F.cross_entropy(theirs(part.images), part.targets, reduction="none")
        sgd.zero_grad()
        (losses[~part.pseudo].mean() + mixture.ratio * losses[part.pseudo].mean()).backward()
        sgd.step()
    pairs = list(zip(ours.model.parameters(), theirs.parameters(), strict=True))
    assert max((a - b).abs().max().item() for a, b in pairs) < 1e-12
    assert max((a - b).abs().max().item() for a, b in zip(begun, theirs.parameters(), strict=True)) > 1e-2


def test_every_batch_has_the_pictures_and_labels_of_its_slots_of_that_order(opened):
    task = opened(Mixture(), augment="none", randaugment_ops=0)
    images = task.train.images
    steps = list(task.train.epoch(1))
    assert len(steps) == 6
    for step, batch in enumerate(steps):
        slots = task.train._keys.draws.slots(1, step, range(8))
        assert batch.ids == [slot.id for slot in slots]
        assert batch.labels.tolist() == [images.labels[index] for index in batch.ids]
        for index, tensor in zip(batch.ids, batch.images, strict=True):
            torch.testing.assert_close(tensor, task.view.evaluate(images.load(index)), rtol=0, atol=0)
    assert {index >= 24 for index in steps[0].ids} == {False, True}
    names = images.names[24:]
    assert all(name.startswith("pseudo:") for name in names)
    assert names[3] == "pseudo:" + task._pictures.names[4]  # row 3 is of picture 4


def test_copies_in_one_batch_are_cropped_differently(opened):
    task = opened(Mixture(ratio=7), augment="imagenet", batch_images=8)
    seen = {}
    for epoch in range(2):
        for batch in task.train.epoch(epoch):
            for index, tensor in zip(batch.ids, batch.images, strict=True):
                if index >= 24:
                    seen.setdefault(index, []).append(tensor)
    copied = [tensors for tensors in seen.values() if len(tensors) > 1]
    assert len(copied) == 15
    for tensors in copied:
        assert len({tensor.numpy().tobytes() for tensor in tensors}) == len(tensors)


def test_pictures_and_draws_travel_to_a_process_that_is_not_forked_without_their_columns(opened):
    task = opened(Mixture())
    images, draws = task.train.images, task.train._keys.draws
    sent = pickle.dumps((images.__reduce__()[1][2], dataclasses.replace(draws)))
    assert len(sent) < 2000
    selection, again = pickle.loads(sent)
    assert again.slots(1, 2, range(8)) == draws.slots(1, 2, range(8))
    assert selection.labels_of(slice(None)).tolist() == list(images.labels[24:])
    made, args = images.__reduce__()
    assert made(*args).names[30] == images.names[30]


def test_a_batch_is_a_batch_of_classification(opened):
    assert all(isinstance(batch, Batch) for batch in opened(Mixture()).train.epoch(0))
