"""A selection on the disk: which pictures a student learns from, how often, and with what label.

    selection.json   format, where it comes from, what was asked for, counts, the columns' sha256; written last
    excluded.jsonl   a line a copy of a held-out picture that was left out: its id, why, of which picture
    classes.png      draws, pictures and doubt of each class; report.html the same, with the most doubtful pictures
    id.npy           uint64, (rows,): the picture's number in the data set that was labelled, in its manifest's order
    label.npy        int32, (rows,): the class
    confidence.npy   float32, (rows,)
    top_class.npy    int16 (int32 of more than 32,767 classes), (rows, K)
    top_prob.npy     float16, (rows, K)
    row.npy          uint32, (draws,): which row each draw is of, ascending

Ids ascend; a class has `per_class` draws where it has any (docs/pseudo-labels.md says how ties and copies fall). Of the
rule "rank" a picture may have several rows, one a class.
"""

from __future__ import annotations

FORMAT = "lambdanets selection 1"
SELECTION_JSON = "selection.json"
ROWS = {"id": "<u8", "label": "<i4", "confidence": "<f4", "top_class": "<i2", "top_prob": "<f2"}
DRAWS = {"row": "<u4"}
