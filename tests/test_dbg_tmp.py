from test_plan_renewal import *
import pytest
@pytest.mark.parametrize("name", ["llama", "roberta"])
def test_it(tmp_path, name):
    b = blueprint(tmp_path, name, 2, batch_size=2, sequence_length=12)
    values = method_values(b, "blockllm", {})
    m = b.build(2)
    o = optimizers.create("blockllm", m, **values)
    names = {id(p): n for n, p in m.named_parameters()}
    big = [i for i in range(len(o._pool)) if o._pool[i].dim() > 1]
    res = []
    batch = b.batch("cpu")
    for i in big:
        for j in big:
            if i == j: continue
            o._choose([i]); o.rule.losses = []
            with MemoryMeter(m, o) as meter:
                for s in range(2):
                    o._probed = [j]; o._activate()
                    with meter.hold([batch]):
                        training_step(m, o, model_loss, [batch], phase=meter.phase)
            res.append((find_peaks(meter.trace)[0][0][0], i, j))
    res.sort(reverse=True)
    for peak, i, j in res[:12]: print("YY", name, peak, names[id(o._pool[i])], "|", names[id(o._pool[j])])
    d = {(i, j): p for p, i, j in res}
    order = sorted(big, key=lambda i: -o._pool[i].numel())
    print("YY now", names[id(o._pool[order[0]])], d[order[0], order[1]], "worst with it", max((d[order[0], j], names[id(o._pool[j])]) for j in big if j != order[0]))
