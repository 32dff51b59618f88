"""How contestants are told apart in all pictures: colour, marker and dash, and a short label."""

import re
from collections.abc import Sequence

from archzoo.report.canvas import DASHES, LABEL_LENGTH, MARKERS, PALETTE, Style
from archzoo.report.contestants import Comparison, Contestant


def styles(comparison: Comparison, baselines: Sequence[str]) -> dict[str, Style]:
    """Label -> style. The baseline is grey; the others take colours by name, and keep them as scores change.

    Where there are series, a layer has one colour, and a series one marker and one dash at all its sizes.
    """
    labels = sorted({group.label for group in comparison.groups})
    if any(group.series for group in comparison.groups):
        return _series_styles(comparison, baselines)
    out = {}
    place = 1
    for label in labels:
        if label in baselines:
            out[label] = Style(0, PALETTE[0][0], *MARKERS[0], "-")
            continue
        index = 1 + (place - 1) % (len(PALETTE) - 1)
        out[label] = Style(index, PALETTE[index][0], *MARKERS[place % len(MARKERS)], DASHES[place % len(DASHES)])
        place += 1
    return out


def _series_styles(comparison: Comparison, baselines: Sequence[str]) -> dict[str, Style]:
    grey = {group.layer for group in comparison.groups if group.label in baselines}
    variants: dict[str, list[str]] = {}
    for group in sorted(comparison.groups, key=lambda group: (group.layer not in grey, group.layer, group.label)):
        names = variants.setdefault(group.layer, [])
        if (name := group.series or group.label) not in names:
            names.append(name)
    first = min(len(grey), 1)  # colour of the first layer that is not the baseline's
    out = {}
    for group in comparison.groups:
        place = list(variants).index(group.layer)
        index = 0 if group.layer in grey else 1 + (place - first) % (len(PALETTE) - 1)
        variant = variants[group.layer].index(group.series or group.label)
        marker = MARKERS[(place + len(variants) * variant) % len(MARKERS)]
        out[group.label] = Style(index, PALETTE[index][0], *marker, DASHES[variant % len(DASHES)])
    return out


def short_labels(groups: Sequence[Contestant]) -> dict[str, str]:
    """Labels short enough for a picture that still differ: options by their initials, then without the middle."""
    out: dict[str, str] = {}
    for group in groups:
        text = group.label
        if len(text) > LABEL_LENGTH and group.options:
            text = f"{group.layer} ({', '.join(f'{_initials(k)}={v}' for k, v in group.options.items())})"
        if len(text) > LABEL_LENGTH:
            head = LABEL_LENGTH // 2
            text = f"{text[:head]}…{text[len(text) - (LABEL_LENGTH - head - 1) :]}"
        number = 2
        base = text
        while text in out.values():
            text = f"{base[: LABEL_LENGTH - 3]} #{number}"
            number += 1
        out[group.label] = text
    return out


def _initials(key: str) -> str:
    words = [word for word in re.split(r"[._]", key) if word]
    return "".join(word[0] for word in words) if len(words) > 1 else key[:3]
