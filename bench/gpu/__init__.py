"""What a GPU is asked: correctness, speed and memory, in pieces of some minutes each. ``python -m bench gpu --help``.

Models have random weights in the shapes of public ones and are made on the device, so nothing is fetched or read.
"""
