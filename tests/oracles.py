"""Slow, obvious versions of every method: NumPy in float64, one item at a time, loops welcome.

Each takes (tokens, item, keep, **options) and returns the kept positions, ascending; those of merging methods return
(positions that an output is made around, in output order with -1 where there is none; output features), projected ones
of methods that merge after the projector.
"""

import math

import numpy as np


def of(tokens, signal, item):
    return tokens.require(signal)[item].double().numpy()


def cosine(a, b):
    na, nb = np.linalg.norm(a), np.linalg.norm(b)
    return float(a @ b / (na * nb)) if na and nb else 0.0


def floor(number):
    """The floor of the number that is meant, 0.7 * 10 being 7."""
    return math.floor(round(number, 9))


def by(scores):
    """Positions, highest score first, of equals the lower."""
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))


def scaled(values, eps=0.0):
    low, high = min(values), max(values)
    return [(v - low) / (high - low + eps) if high - low + eps else 0.0 for v in values]


def text_relevance(tokens, item):
    """Mean cosine of each token with the pieces of the instruction, in CLIP's space."""
    pieces = [t for t in of(tokens, "text_embeds", item) if t.any()]
    return [float(np.mean([cosine(e, t) for t in pieces])) for e in of(tokens, "image_embeds", item)]


def words(tokens, item):
    return [w for w in of(tokens, "text_token_embeds", item) if w.any()]


def fastervlm(tokens, item, keep):
    return sorted(by(of(tokens, "cls_attention", item).mean(0))[:keep])


def max_min(distance, keep, start):
    """Picked places, from those in ``start`` on."""
    picked = list(start)
    while len(picked) < keep:
        left = [i for i in range(len(distance)) if i not in picked]
        picked.append(max(left, key=lambda i: min(distance[i][j] for j in picked)))
    return picked


def divprune_places(x, keep):
    n = len(x)
    distance = [[1 - cosine(x[i], x[j]) for j in range(n)] for i in range(n)]
    nearest_other = [min((distance[i][j] for j in range(n) if j != i), default=math.inf) for i in range(n)]
    return max_min(distance, keep, [max(range(n), key=lambda i: nearest_other[i])])


def divprune(tokens, item, keep):
    return sorted(divprune_places(of(tokens, "projected", item), keep))


def fps(tokens, item, keep, start="far", space="projected"):
    x = of(tokens, space, item)
    from_mean = [np.linalg.norm(v - x.mean(0)) for v in x]
    first = {"far": int(np.argmax(from_mean)), "center": int(np.argmin(from_mean)), "first": 0}[start]
    distance = [[np.linalg.norm(a - b) for b in x] for a in x]
    return sorted(max_min(distance, keep, [first]))


def vispruner_rounds(x, chosen, rest, wanted):
    while len(rest) > wanted:
        even, odd = rest[0::2], rest[1::2]
        drop = min(8, len(rest) - wanted, len(even))
        ranked = sorted(even, key=lambda a: -max((cosine(x[a], x[b]) for b in odd), default=0.0))
        rest = ranked[drop:] + odd
    return sorted(chosen + rest)


def vispruner(tokens, item, keep, share=0.5, saliency="cls"):
    order = by(of(tokens, f"{saliency}_attention", item).mean(0))
    head = int(keep * share)
    return vispruner_rounds(of(tokens, "features", item), order[:head], order[head:], keep - head)


def prismprune(tokens, item, keep, start="salient", metric="cosine", ratio=0.5, factor=4):
    x, attention = of(tokens, "features", item), of(tokens, "cls_attention", item)
    mean, variance = attention.mean(0), attention.var(0)
    diverse = floor(keep * (1 - ratio))
    kept = by(mean)[: keep - diverse]
    rest = [i for i in range(len(x)) if i not in kept]
    pool = sorted(rest, key=lambda i: (-variance[i], i))[: (factor * diverse or len(rest))]

    def measure(i, j):
        return 1 - cosine(x[i], x[j]) if metric == "cosine" else np.linalg.norm(x[i] - x[j])

    reference = list(kept) if start == "salient" and kept else []
    picked = []
    while len(picked) < diverse:
        if not reference:
            new = pool[0]
        else:
            left = sorted(i for i in pool if i not in picked)
            new = max(left, key=lambda i: min(measure(i, j) for j in reference))
        picked.append(new)
        reference.append(new)
    return sorted(kept + picked)


def dpp(x, quality, keep):
    """Greedy MAP by what it means: the volume that each token would add, from scratch at every step."""
    n = len(x)
    kernel = np.array([[quality[i] * quality[j] * cosine(x[i], x[j]) for j in range(n)] for i in range(n)])
    floor = 1e-6 * max(kernel.diagonal())
    picked, basis = [], []
    while len(picked) < keep:
        left = [i for i in range(n) if i not in picked]
        gain = {}
        for i in left:
            rest = kernel[i, i]
            if basis:
                inner = kernel[np.ix_(basis, basis)]
                rest -= kernel[i, basis] @ np.linalg.solve(inner, kernel[basis, i])
            gain[i] = rest
        fertile = [i for i in left if gain[i] > floor]
        new = max(fertile, key=lambda i: gain[i]) if fertile else max(left, key=lambda i: quality[i])
        if fertile:
            basis.append(new)
        picked.append(new)
    return sorted(picked)


def cdpruner(tokens, item, keep, sign=-1):
    relevance = [sign * r for r in text_relevance(tokens, item)]
    low, high = min(relevance), max(relevance)
    quality = [(r - low + 1e-6) / (high - low) if high > low else 1.0 for r in relevance]
    return dpp(of(tokens, "projected", item), quality, keep)


def crisprune(
    tokens, item, keep, alpha=0.5, decay=0.5, tau=0.98, saliency="cls", text="clip", sign=1, space="projected"
):
    a = of(tokens, f"{saliency}_attention", item).mean(0)
    high, low = np.quantile(a, tau), a.min()
    visual = [(min(v, high) - low) / (high - low + 1e-6) for v in a]
    if text == "clip":
        instruction = text_relevance(tokens, item)
        seen, prompts = of(tokens, "image_embeds", item), of(tokens, "general_embeds", item)
    else:
        seen, prompts = of(tokens, "projected", item), of(tokens, "general_token_embeds", item)
        mean = np.mean(words(tokens, item), axis=0)
        instruction = [cosine(v, mean) for v in seen]
    general = [max(sign * cosine(v, p) for p in prompts) for v in seen]
    instruction, general = scaled([sign * r for r in instruction], 1e-6), scaled(general, 1e-6)
    semantic = [max(i, decay * g) for i, g in zip(instruction, general, strict=True)]
    quality = [alpha * s + (1 - alpha) * v for s, v in zip(semantic, visual, strict=True)]
    return dpp(of(tokens, space, item), quality, keep)


def digamma(n):
    return sum(1 / i for i in range(1, n)) - 0.5772156649015329


def information(a, b, neighbours=3):
    """Kraskov's first estimator: pairs of channels are the samples."""
    a, b = a / a.std(), b / b.std()
    total = 0.0
    for i in range(len(a)):
        others = [j for j in range(len(a)) if j != i]
        reach = sorted(max(abs(a[i] - a[j]), abs(b[i] - b[j])) for j in others)[neighbours - 1]
        for values in (a, b):
            total += digamma(sum(abs(values[i] - values[j]) < reach for j in others) + 1)
    return max(0.0, digamma(len(a)) + digamma(neighbours) - total / len(a))


def align(tokens, item, count, metric="l2"):
    x, text = of(tokens, "projected", item), words(tokens, item)
    if metric == "l2":
        score = [-np.mean([np.linalg.norm(v - w) for w in text]) for v in x]
    elif metric == "mutual_information":
        score = [np.mean([information(v, w) for w in text]) for v in x]
    else:
        score = [np.mean([cosine(v, w) for w in text]) for v in x]
    return score, sorted(by(score)[:count])


def repmax(x, places, keep, metric="cosine"):
    def alike(i, j):
        return cosine(x[i], x[j]) if metric == "cosine" else -np.linalg.norm(x[i] - x[j])

    picked = [min(places, key=lambda i: np.mean([alike(i, j) for j in places]))]
    while len(picked) < keep:
        left = [i for i in places if i not in picked]
        picked.append(min(left, key=lambda i: np.mean([alike(i, j) for j in picked])))
    return sorted(picked)


def trimtokenator(tokens, item, keep, ratio=0.8, alignment="l2", redundancy="cosine", stages="align_repmax"):
    x = of(tokens, "projected", item)
    first = max(floor(ratio * len(x)), keep)
    everything = list(range(len(x)))
    if stages == "align":
        return align(tokens, item, keep, alignment)[1]
    if stages == "repmax":
        return repmax(x, everything, keep, redundancy)
    if stages == "repmax_align":
        score = align(tokens, item, keep, alignment)[0]
        return sorted(sorted(repmax(x, everything, first, redundancy), key=lambda i: (-score[i], i))[:keep])
    return repmax(x, align(tokens, item, first, alignment)[1], keep, redundancy)


def divprune_aligned(tokens, item, keep):
    x = of(tokens, "projected", item)
    places = align(tokens, item, max(floor(0.8 * len(x)), keep))[1]
    return sorted(places[i] for i in divprune_places(x[places], keep))


def hiprune(tokens, item, keep, alpha=0.1):
    middle, deep = (of(tokens, name, item).mean(0) for name in ("object_attention", "received_attention"))
    n, width = len(deep), tokens.grid[1]
    anchors = by(middle)[: round(keep * alpha / 5)]
    around = {min(max(a + step, 0), n - 1) for a in anchors for step in (-1, 1, -width, width)}
    ranked = sorted(anchors, key=lambda i: -deep[i])
    ranked += sorted(around - set(anchors), key=lambda i: -deep[i])
    ranked += [i for i in by(deep) if i not in set(anchors) | around]
    return sorted(ranked[:keep])


def gridprune(tokens, item, keep, zones=4, alpha=0.5):
    relevance, saliency = scaled(text_relevance(tokens, item)), scaled(of(tokens, "cls_attention", item).mean(0))
    score = [alpha * r + (1 - alpha) * s for r, s in zip(relevance, saliency, strict=True)]
    rows, columns = tokens.grid
    high, wide = min(zones, rows), min(zones, columns)
    zone = [(i // columns * high // rows, i % columns * wide // columns) for i in range(rows * columns)]
    weight = {z: max(np.mean([s for s, other in zip(score, zone, strict=True) if other == z]), 1e-6) for z in zone}
    seats = dict.fromkeys(zone, 0)
    kept = []
    for _ in range(keep):  # one seat at a time, to the zone with the highest average
        free = {z: [i for i in range(len(score)) if zone[i] == z and i not in kept] for z in weight}
        best = max((z for z in free if free[z]), key=lambda z: weight[z] / (2 * seats[z] + 1))
        kept.append(max(free[best], key=lambda i: score[i]))
        seats[best] += 1
    return sorted(kept)


def holov_seats(score, sizes, keep, overflow):
    total = sum(score)
    weight = [v / (total + 1e-6) if total > 0 else 1 / len(score) for v in score]
    heaviest = by(weight)
    seats = [math.floor(w * keep) for w in weight]
    for i in heaviest if overflow == "published" else heaviest * keep:
        if sum(seats) < keep:
            seats[i] += 1
    lost = sum(max(0, seat - size) for seat, size in zip(seats, sizes, strict=True))
    seats = [min(seat, size) for seat, size in zip(seats, sizes, strict=True)]
    while lost and overflow != "published":
        for i in heaviest:
            if lost and seats[i] < sizes[i]:
                seats[i] += 1
                lost -= 1
    return seats


def holov_order(tokens, item, keep, runs=16, alpha=0.09, overflow="redistribute"):
    """Kept tokens run by run, the most attended of each first, or in raster order where a run is kept whole."""
    x, a = of(tokens, "projected", item), of(tokens, "cls_attention", item).mean(0)
    pieces = [list(piece) for piece in np.array_split(np.arange(len(x)), runs) if len(piece)]
    score = []
    for piece in pieces:
        if len(piece) == 1:
            score.append(a[piece[0]])
            continue
        variance = []
        for i in piece:
            row = [0.0 if i == j else cosine(x[i], x[j]) for j in piece]
            mean = sum(row) / (len(piece) - 1)
            variance.append(sum((v - mean) ** 2 for v in row) / (len(piece) - 1))
        b = [1000 * a[i] for i in piece]
        factor = np.mean(np.abs(b)) / (np.mean(np.abs(variance)) + 1e-6)
        score.append(np.mean([u + alpha * v * factor for u, v in zip(b, variance, strict=True)]))
    order = []
    for piece, seats in zip(pieces, holov_seats(score, [len(p) for p in pieces], keep, overflow), strict=True):
        ranked = [piece[i] for i in by([a[i] for i in piece])]
        order += piece if seats == len(piece) else ranked[:seats]
    return [int(i) for i in order]


def holov(tokens, item, keep, **options):
    return list(range(tokens.count)) if keep == tokens.count else sorted(holov_order(tokens, item, keep, **options))


def scope(tokens, item, keep, alpha=1.0, combination="multiply"):
    x, a = of(tokens, "features", item), of(tokens, "cls_attention", item).sum(0)
    alike = [[cosine(u, v) for v in x] for u in x]
    cover, kept = [0.0] * len(x), []
    while len(kept) < keep:
        gain = {}
        for j in range(len(x)):
            if j not in kept:
                added = sum(max(0.0, alike[i][j] - cover[i]) for i in range(len(x)))
                gain[j] = added * a[j] ** alpha if combination == "multiply" else added + a[j] ** alpha
        best = max(gain, key=lambda j: gain[j])
        kept.append(best)
        cover = [max(c, alike[i][best]) for i, c in enumerate(cover)]
    return sorted(kept)


def spectral_entropy(x):
    unit = np.array([v / max(np.linalg.norm(v), 1e-8) for v in x])
    values = np.linalg.svd(unit - unit.mean(0), compute_uv=False) ** 2
    p = np.maximum(values, 1e-12)
    p = p / p.sum()
    return float(-(p * np.log(p)).sum() / (math.log(min(x.shape)) + 1e-12))


def promprune_parts(tokens, item, keep, mu=0.42, tau=0.02, low=0.0, high=1.0):
    """Salient tokens by attention, and then those of the process in order of picking."""
    x, a = of(tokens, "projected", item), of(tokens, "cls_attention", item).mean(0)
    height = min(max((spectral_entropy(x) - mu) / (tau + 1e-12), -20), 20)
    share = low + (high - low) * (1 - 1 / (1 + math.exp(-height)))
    salient = by(a)[: round(share * keep)]
    rest = [i for i in range(len(x)) if i not in salient]
    kernel = np.array([[cosine(x[i], x[j]) for j in range(len(x))] for i in range(len(x))])
    picks, filled, floor = [], [], 0.0
    while len(salient) + len(picks) < keep:
        left = [i for i in rest if i not in picks]
        if not picks:
            picks.append(min(left, key=lambda i: max((kernel[i, j] for j in salient), default=0.0)))
            continue
        basis = [i for i in picks if i not in filled]
        inner = np.linalg.solve(kernel[np.ix_(basis, basis)], kernel[basis][:, left])
        gain = dict(zip(left, kernel[left, left] - (kernel[basis][:, left] * inner).sum(0), strict=True))
        floor = floor or 1e-6 * max(gain.values())
        best = max(left, key=lambda i: gain[i])
        if gain[best] <= floor:  # the rank is used up
            best = max(left, key=lambda i: a[i])
            filled.append(best)
        picks.append(best)
    return salient, picks


def promprune(tokens, item, keep, **options):
    if keep == tokens.count:
        return list(range(keep))
    salient, picks = promprune_parts(tokens, item, keep, **options)
    return sorted(salient + picks)


def erank(x):
    values = np.linalg.svd(x, compute_uv=False)
    share = values[values > 1e-12 * values.max()] / values.sum()
    return math.exp(-sum(s * math.log(s) for s in share))


def adaptive_walk(tokens, item, keep, average=94.87, tau_max=0.5, count="rank", refill="attention"):
    """The walk of section 4.3, step by step: what is kept, and how many of it before the pool ran dry."""
    x, attention = of(tokens, "projected", item), of(tokens, "cls_attention", item).mean(0)
    order = by(attention)
    slope = erank(x) / average * 0.01
    pool, removed, kept, walked = list(order), [], [], 0
    while len(kept) < keep:
        if not pool:
            walked = walked or len(kept)
            removed.sort(key=order.index)
            if refill == "again":
                pool, removed = removed, []
            elif refill == "farthest":
                best = max(removed, key=lambda i: min(1 - cosine(x[i], x[j]) for j in kept))
                kept.append(removed.pop(removed.index(best)))
                continue
            else:
                kept += removed[: keep - len(kept)]
                break
        token = pool.pop(0)
        tau = min((len(kept) + 1 if count == "pick" else order.index(token) + 1) * slope, tau_max)
        kept.append(token)
        near = [other for other in pool if 1 - cosine(x[token], x[other]) < tau]
        removed += near
        pool = [other for other in pool if other not in near]
    return sorted(kept), walked or keep


def adaptive_threshold(tokens, item, keep, average=94.87, tau_max=0.5, count="rank", refill="attention"):
    return adaptive_walk(tokens, item, keep, average, tau_max, count, refill)[0]


def random_tokens(tokens, item, keep, seed=0):
    def scramble(value):
        for factor in (0x45D9F3B, 0x119DE1F3):
            value = ((value ^ (value >> 16)) * factor) % 2**31
        return value ^ (value >> 15)

    key = (int(tokens.signals["image_key"][item]) + seed * 0x9E3779B1) % 2**31
    return sorted(by([scramble(scramble(key) + scramble(i + 1)) for i in range(tokens.count)])[:keep])


# ---- methods that merge ----------------------------------------------------------------------------------------


def everything(tokens, item):
    return list(range(tokens.count)), of(tokens, "features", item)


def visionzip(tokens, item, keep):
    if keep == tokens.count:
        return everything(tokens, item)
    x, keys = of(tokens, "features", item), of(tokens, "keys", item)
    contextual = min(round(keep * 5 / 32), keep - 1)
    dominant = sorted(by(of(tokens, "cls_attention", item).sum(0))[: keep - contextual - 1])
    rest = [i for i in range(len(x)) if i not in dominant]
    step = max(1, len(rest) // contextual) if contextual else 1
    targets = rest[::step][:contextual]
    groups = {t: [] for t in targets}
    for i in rest:
        if targets and i not in targets:
            groups[max(targets, key=lambda t: cosine(keys[i], keys[t]))].append(x[i])
    output = [of(tokens, "cls_feature", item)] + [x[i] for i in dominant]
    output += [x[t] + (np.mean(groups[t], axis=0) if groups[t] else 0) for t in targets]
    return [-1, *dominant, *targets], np.array(output)


def neighbour_merge(tokens, item, kept, rest):
    x, keys, a = (of(tokens, name, item) for name in ("features", "reader_keys", "reader_attention"))
    output = []
    for i in kept:
        others = sorted((j for j in range(len(x)) if j != i), key=lambda j: (-cosine(keys[i], keys[j]), j))[:32]
        output.append(x[i] + sum(a[j] * x[j] for j in others))
    dropped = [j for j in range(len(x)) if j not in kept]
    if rest and dropped:
        return [*kept, -1], np.array([*output, sum(a[j] * x[j] for j in dropped)])
    return list(kept), np.array(output)


def prumerge(tokens, item, keep):
    if keep == tokens.count:
        return everything(tokens, item)
    order = by(of(tokens, "reader_attention", item))
    return neighbour_merge(tokens, item, order[: max(keep - 1, 1)], keep > 1)


def outliers(scores):
    first, third = np.percentile(scores, [25, 75])
    return sum(s > third + 1.5 * (third - first) for s in scores) / len(scores)


def prumerge_outliers(tokens, item):
    a = of(tokens, "reader_attention", item)
    return neighbour_merge(tokens, item, by(a)[: max(1, int(len(a) * outliers(a)))], True)


def prumerge_plus(tokens, item, keep):
    if keep == tokens.count:
        return everything(tokens, item)
    order = by(of(tokens, "reader_attention", item))
    wanted = max(keep - 1, 1)
    head = order[: (wanted + 1) // 2]
    others = sorted(set(order) - set(head))
    number = wanted - len(head)
    samples = [others[int((i + 0.5) * len(others) / number)] for i in range(number)]
    return neighbour_merge(tokens, item, head + samples, keep > 1)


def prumerge_plus_outliers(tokens, item):
    a = of(tokens, "reader_attention", item)
    share = outliers(a)
    head = by(a)[: max(1, int(len(a) * share))]
    step = int(1 / share) if share else len(a)
    samples = [i for i in range(0, len(a) - 1, max(1, int(step / 3))) if i not in head]
    return neighbour_merge(tokens, item, head + samples, True)


def trim(tokens, item, keep, sign=-1, count="budget"):
    if keep == tokens.count and count == "budget":
        return everything(tokens, item)
    x = of(tokens, "features", item)
    logits = sign * (of(tokens, "image_embeds", item) @ of(tokens, "text_embeds", item)[0])
    score = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    number = max(keep - 1, 1) if count == "budget" else max(1, int(len(x) * outliers(score)))
    kept = sorted(by(score)[:number])
    dropped = [i for i in range(len(x)) if i not in kept]
    if dropped and (count == "outliers" or keep > 1):
        return [*kept, -1], np.array([*x[kept], x[dropped].mean(0)])
    return kept, x[kept]


def tome(tokens, item, keep, metric="keys"):
    groups = [[i] for i in range(tokens.count)]
    x, m = of(tokens, "features", item), of(tokens, metric, item)

    def mean(group, values):
        return values[group].mean(0)

    while len(groups) > keep:
        remove = min(len(groups) - keep, len(groups) // 2)
        even, odd = groups[0::2], groups[1::2]
        match = []
        for a in even:
            alike = [cosine(mean(a, m), mean(b, m)) for b in odd]
            match.append((max(alike), alike.index(max(alike))))
        order = sorted(range(len(even)), key=lambda i: -match[i][0])
        merged = [list(group) for group in odd]
        for i in order[:remove]:
            merged[match[i][1]] += even[i]
        groups = [even[i] for i in order[remove:]] + merged
    return [group[0] for group in groups], np.array([mean(group, x) for group in groups])


def bat(tokens, item, keep, ratio=0.5, k=5):
    if keep == tokens.count:
        return everything(tokens, item)
    x, attention = of(tokens, "features", item), of(tokens, "cls_attention", item).mean(0)
    kept = by(attention)[: int(keep * ratio)]
    rest = [i for i in range(len(x)) if i not in kept]
    apart = {i: {j: np.linalg.norm(x[i] - x[j]) for j in rest} for i in rest}
    scale = np.mean([d * d for row in apart.values() for d in row.values()]) or 1.0
    density = {i: math.exp(-np.mean([d * d for d in sorted(apart[i].values())[: k + 1]]) / scale) for i in rest}
    widest = max(max(row.values()) for row in apart.values())
    peak = {}
    for i in rest:
        denser = [apart[i][j] for j in rest if density[j] > density[i]]
        peak[i] = density[i] * (min(denser) if denser else widest)
    centres = sorted(rest, key=lambda i: (-peak[i], i))[: keep - len(kept)]
    groups = {c: [] for c in centres}
    for i in rest:
        groups[i if i in groups else min(sorted(centres), key=lambda c: apart[i][c])].append(i)
    places = sorted([*kept, *centres])
    output = [x[p] if p in kept else np.average(x[groups[p]], axis=0, weights=attention[groups[p]]) for p in places]
    return places, np.array(output)


def vscan(tokens, item, keep, ratio=0.5, fill="global"):
    if keep == tokens.count:
        return list(range(keep)), of(tokens, "projected", item)
    rows, columns = tokens.grid
    shallow, deep = (of(tokens, name, item).mean(0) for name in ("shallow_attention", "cls_attention"))
    windows = []
    for i in range(4):
        for j in range(4):
            down = range(i * rows // 4, (i + 1) * rows // 4)
            across = range(j * columns // 4, (j + 1) * columns // 4)
            windows.append([r * columns + c for r in down for c in across])
    local = []
    quota = int(keep * ratio) // sum(bool(window) for window in windows)
    for window in windows:
        local += sorted(window, key=lambda i: (-shallow[i], i))[:quota]
    wanted = keep - (len(local) if fill == "global" else int(keep * ratio))
    kept = sorted(local + [i for i in by(deep) if i not in local][:wanted])
    x = of(tokens, "projected", item)
    groups = {k: [k] for k in kept}
    for i in range(len(x)):
        if i not in groups:
            groups[max(kept, key=lambda k: cosine(x[i], x[k]))].append(i)
    return kept, np.array([x[groups[k]].mean(0) for k in kept])


def prunesid_patches(x, a, keep, wanted):
    values = 1 / (1 + np.exp(-x))
    groups = max(1, keep // 4)
    directions = np.linalg.svd((values - values.mean(1, keepdims=True)).T)[2][:groups]
    group = [int(np.argmax(np.abs(directions[:, i]))) for i in range(len(x))]
    alike = [[cosine(u, v) for v in x] for u in x]
    pairs = [alike[i][j] for i in range(len(x)) for j in range(i + 1, len(x))]
    limit = sum(pairs) / max(len(pairs), 1) * keep / 32
    taken, ranked = [], []
    for g in range(groups):
        left = [i for i in by(a) if group[i] == g and a[i] > 0]
        taken.append([])
        while left:
            best = left[0]
            taken[g].append(best)
            left = [i for i in left[1:] if alike[best][i] <= limit]
        ranked.append(taken[g] + [i for i in by(a) if group[i] == g and i not in taken[g]])
    size, number = [len(r) for r in ranked], [len(t) for t in taken]
    least = [min(1, w) for w in size]
    most = [min(5 * math.ceil(keep / 64), w, c) for w, c in zip(size, number, strict=True)]
    while sum(most) < keep:
        most = [min(u + 1, w) for u, w in zip(most, size, strict=True)]
    spare = max(0, wanted - sum(least))
    seats, reached, before = [], 0.0, 0
    for low, up, c in zip(least, most, number, strict=True):
        reached += c / max(sum(number), 1)
        seats.append(min(low + round(reached * spare) - before, up))
        before = round(reached * spare)
    for g in by(number):
        seats[g] += min(most[g] - seats[g], max(spare + sum(least) - sum(seats), 0))
    return [i for g in range(groups) for i in ranked[g][: seats[g]]][:wanted]


def prunesid(tokens, item, keep, count_cls=True):
    if keep == tokens.count:
        return everything(tokens, item)
    x, a = of(tokens, "features", item), of(tokens, "cls_attention", item).sum(0)
    kept = sorted(prunesid_patches(x, a, keep, keep - count_cls))
    if not count_cls:
        return kept
    return [-1, *kept], np.array([of(tokens, "cls_feature", item), *x[kept]])


def downsample(tokens, item, keep):
    """Areas by counting: every patch is cut into fine cells, and each cell belongs to one region."""
    rows, columns = tokens.grid
    x = of(tokens, "features", item)
    strips = max(round(math.sqrt(keep * rows / columns)), math.ceil(keep / columns), 1)
    places, output = [], []
    for strip in range(strips):
        regions = keep // strips + (strip < keep % strips)
        for region in range(regions):
            weights = np.array(
                [
                    max(0, min(r + 1, (strip + 1) * rows / strips) - max(r, strip * rows / strips))
                    * max(0, min(c + 1, (region + 1) * columns / regions) - max(c, region * columns / regions))
                    for r in range(rows)
                    for c in range(columns)
                ]
            )
            output.append(weights @ x / weights.sum())
            places.append(int((strip + 0.5) * rows / strips) * columns + int((region + 0.5) * columns / regions))
    return places, np.array(output)


KEEPING = {
    "adaptive": adaptive_threshold,
    "cdpruner": cdpruner,
    "crisprune": crisprune,
    "divprune": divprune,
    "divprune_aligned": divprune_aligned,
    "fastervlm": fastervlm,
    "fps": fps,
    "gridprune": gridprune,
    "hiprune": hiprune,
    "holov": holov,
    "prismprune": prismprune,
    "promprune": promprune,
    "random": random_tokens,
    "scope": scope,
    "trimtokenator": trimtokenator,
    "vispruner": vispruner,
}
MERGING = {
    "bat": bat,
    "downsample": downsample,
    "prumerge": prumerge,
    "prumerge_plus": prumerge_plus,
    "prunesid": prunesid,
    "tome": tome,
    "trim": trim,
    "visionzip": visionzip,
    "vscan": vscan,
}
