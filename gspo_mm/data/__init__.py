"""WebDataset shards -> prompts, encoded by one processor call.

places.py     where shards are: paths, URLs, commands
shards.py     one shard -> raw samples, damage named
stream.py     one source: shuffled, resumable
mixture.py    several sources in one order
prefetch.py   reads ahead in a thread
media.py      what looks like a picture, video or sound
samples.py    raw sample -> Prompt, or why not
pictures.py   encoded image -> what all sides see of it
odd.py        prompts whose pictures are unlike the others'
filters.py    sound prompts that a run does not want
processor.py  Prompt -> token ids and pixels
skips.py      counts and lists what is not used
source.py     all of them, for the training loop
"""
