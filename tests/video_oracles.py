"""Slow versions of the methods for videos: NumPy, float64, one clip at a time, loops as the papers' steps read."""

import math

import numpy as np


def array(values, item):
    return values[item].double().numpy()


def clip(tokens, item):
    return array(tokens.projected, item).reshape(tokens.frames, tokens.per_frame, -1)


def cosine(a, b, least=1e-8):
    # As float32, or rounding would put equal frames in an order of its own.
    return np.float32(float(a @ b) / (max(np.linalg.norm(a), least) * max(np.linalg.norm(b), least)))


def evs(tokens, item, keep):
    x = clip(tokens, item)
    frames, count = x.shape[:2]
    change = {}
    for t in range(frames):
        for i in range(count):
            change[t * count + i] = 255 if t == 0 else 1 - cosine(x[t, i], x[t - 1, i])
    kept = max(count, keep)
    return sorted(sorted(change, key=lambda place: (-change[place], place))[:kept])


def vidcom2(tokens, item, keep, count="fixed", ratio=None):
    x = clip(tokens, item)
    frames, size, width = x.shape
    if ratio is None:
        ratio = keep / (frames * size)
    else:
        keep = min(max(frames, int(frames * size * (1 - (1 - ratio)))), frames * size)
    variance = x.reshape(-1, width).var(axis=0)
    steady = sorted(range(width), key=lambda c: (variance[c], c))[: max(1, width // 2)]
    unit = x[..., steady]
    unit = unit / np.maximum(np.linalg.norm(unit, axis=-1, keepdims=True), 1e-12)
    whole = unit.reshape(-1, len(steady)).mean(axis=0)

    def like(a, b):
        return sum(math.exp(-float((a - b) @ (a - b)) / (2 * alpha)) for alpha in (1 / 8, 1 / 4, 1 / 2, 1, 2))

    video = np.array([[like(unit[t, i], whole) for i in range(size)] for t in range(frames)])
    frame = np.array([[like(unit[t, i], unit[t].mean(axis=0)) for i in range(size)] for t in range(frames)])
    redundancy = (video + frame).flatten()
    unlike = -video.mean(axis=1)
    weight = np.exp((unlike - unlike.max()) / 0.01)
    weight = weight / weight.sum()
    chosen = []
    for t in range(frames):
        scale = min(1, ratio * (1 + weight[t] - 1 / frames))
        number = min(size, max(1, round(scale * size)))
        places = range(t * size, (t + 1) * size)
        chosen += sorted(places, key=lambda place: (redundancy[place], place))[:number]
    if count == "fixed":
        by_redundancy = sorted(range(frames * size), key=lambda place: (redundancy[place], place))
        chosen = [place for place in by_redundancy if place in chosen][:keep]
        chosen += [place for place in by_redundancy if place not in chosen][: keep - len(chosen)]
    return sorted(chosen)


def dycoke(tokens, item, keep, ratio=None, groups="full", order="raster"):
    x = clip(tokens, item)
    frames, count = x.shape[:2]
    against = {}
    for t in range(1, frames, 2):
        against[t] = t - 1
    for i in range(0, frames, 4):
        if i + 2 < frames and (groups == "full" or i < frames - 4):
            against[i + 2] = i
    dropped = [frames - 1] if groups == "published" and frames % 2 and frames > 1 else []
    pruned = sorted(set(against) - set(dropped))
    rest = keep - (frames - len(pruned) - len(dropped)) * count
    kept = []
    for t in range(frames):
        if t in dropped:
            continue
        number = count
        if t in pruned:
            nth = pruned.index(t)
            even = math.floor(rest * (nth + 1) / len(pruned)) - math.floor(rest * nth / len(pruned))
            number = min(count, max(1, even if ratio is None else int((1 - ratio) * count)))
        least_alike = range(count)
        if t in pruned:
            near = [cosine(x[t, i], x[against[t], i]) for i in range(count)]
            least_alike = sorted(range(count), key=near.__getitem__)
        kept += [t * count + i for i in least_alike[:number]]
    return kept if order == "published" else sorted(kept)


def fastvid(tokens, item, keep, count="fixed", frames_by="received", segments=8, tau=None, share=0.4, step=4, beta=0.6):
    """Return the kept places, ascending, and what is in their slots (K, D)."""
    x, own = clip(tokens, item), array(tokens.projected, item)
    frames, size = x.shape[:2]
    if frames_by == "received":
        g, a = x.mean(axis=1), array(tokens.signals["received_attention"], item).mean(axis=0)
        tau = 0.84 if tau is None else tau
    else:
        g, a = array(tokens.signals["head_feature"], item), array(tokens.signals["head_attention"], item)
        g, tau = g.reshape(frames, -1), 0.9 if tau is None else tau
    a = a.reshape(frames, size)
    runs = segments_of(g, segments, tau)
    salient_count, context_count, alone = shares(runs, frames, size, keep, count, share, step)
    salient = {t: sorted(range(size), key=lambda i: (-a[t, i], i))[: salient_count[t]] for t in range(frames)}
    result = {t * size + i: own[t * size + i] for t in range(frames) for i in salient[t]}
    for run in runs:
        for t in run:
            others = [i for i in range(size) if i not in salient[t]]
            context = density_peaks(x[t], others, context_count[t])
            group = [t] if t in alone else run
            joining = [(u, j) for u in group for j in range(size) if j not in salient[u] and context]
            sums = {i: [np.zeros(own.shape[1]), 0] for i in context}
            for u, j in joining:
                near_to = [cosine(x[u, j], x[t, i], 1e-30) for i in context]
                target = context[int(np.argmax(near_to))]
                sums[target][0] = sums[target][0] + own[u * size + j]
                sums[target][1] += 1
            for i, (total, h) in sums.items():
                w = max(1 / (h + 1), beta)
                result[t * size + i] = w * own[t * size + i] + (1 - w) * total / max(h, 1)
    places = sorted(result)
    return places, np.array([result[place] for place in places]).reshape(len(places), own.shape[1])


def segments_of(g, segments, tau):
    """Return runs of frames between cuts."""
    frames = len(g)
    alike = [cosine(g[t], g[t + 1], 1e-30) for t in range(frames - 1)]
    cut = set(sorted(range(frames - 1), key=lambda t: (alike[t], t))[: min(segments - 1, frames - 1)])
    cut |= {t for t in range(frames - 1) if alike[t] < tau}
    runs, run = [], []
    for t in range(frames):
        run.append(t)
        if t in cut or t == frames - 1:
            runs.append(run)
            run = []
    return runs


def shares(runs, frames, size, keep, count, share, step):
    """Return salient and context tokens of each frame, and the anchors that merge their own frame alone."""
    budget = keep // frames
    n = int(budget * share)
    rest = keep - budget * frames if count == "fixed" else 0
    salient, context, alone = {}, dict.fromkeys(range(frames), 0), set()
    for t in range(frames):
        salient[t] = budget - n + (t + 1) * rest // frames - t * rest // frames
    for run in runs:
        anchors = run[::-1][::step][::-1]
        each, left = n * len(run) // len(anchors), n * len(run) % len(anchors)
        lacking = 0
        for place, t in enumerate(anchors):
            wanted = each + (1 if count == "fixed" and place < left else 0)
            context[t] = min(wanted, size - salient[t])
            lacking += wanted - context[t]
            alone |= {t} if each == n else set()
        for t in run:
            more = min(lacking, size - salient[t] - context[t])
            salient[t] += more
            lacking -= more
    return salient, context, alone


def density_peaks(x, others, wanted):
    """Return the ``wanted`` places of ``others`` with the highest density times distance, ascending."""
    if not wanted:
        return []
    d = np.array([[np.linalg.norm(x[i] - x[j]) / math.sqrt(x.shape[1]) for j in others] for i in others])
    rho = np.exp(-(np.sort(d, axis=1)[:, :4] ** 2).mean(axis=1))
    score = []
    for i in range(len(others)):
        denser = [d[i, j] for j in range(len(others)) if rho[j] > rho[i]]
        score.append(min(denser, default=d.max()) * rho[i])
    best = sorted(range(len(others)), key=lambda i: (-score[i], i))[:wanted]
    return sorted(others[i] for i in best)
