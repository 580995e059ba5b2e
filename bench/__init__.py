"""torchyard's engine beside the ways people build such images today: same wheels, same base, one run.

Every contender starts from wheels on the local disk that have just been read once, so they are in memory if they fit,
and from a base that its engine has seen before. It ends when the image is complete: for BuildKit in the engine (a, b)
or as an archive (c), for torchyard in its store (d). As these are not one and the same place, the time until
`import torch` has returned in a container is measured for each as well. A contender whose image does not run, or
has another torch than the cell declares, fails the run; a slow one never does.
"""
