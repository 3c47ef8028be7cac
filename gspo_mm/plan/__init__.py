"""`gspo-mm plan`: memory and time of a run, worked out before it is queued. Pure Python, so that it answers in seconds anywhere.

    hardware.py   GPUs and networks from their makers' sheets; the few efficiencies that published runs decide
    model.py      a config.json -> numbers of parameters and FLOPs by part; vision.py of the tower; what differs between
                  families is in families/traits.py, and families/published.py has some models at hand
    setup.py      config, nodes and lengths -> what is planned
    memory.py     bytes of each kind of rank; activations.py what a micro-batch keeps; serving.py of a server
    training.py   seconds of a pass over a batch of answers
    rollout.py    seconds of sampling it
    step.py       the step that they make, and its bottleneck
    search.py     layouts, and the split of nodes between trainer and servers
    advice.py     which single change makes a run fit

Dims: N tokens of a micro-batch, D hidden, F inner size of an MLP, E experts, K experts chosen, V vocabulary. Bytes, seconds
and FLOPs are plain numbers without prefixes.
"""
