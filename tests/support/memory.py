"""How much memory loading a weight file takes, in a process of its own."""

# Prints (most anonymous memory meanwhile, bytes of all arrays, of the largest one).
MEASURE = """
import sys, threading, time
import jax
jax.numpy.zeros(3).block_until_ready()
from diffit_jax.interop import official

def anonymous():
    for line in open("/proc/self/smaps_rollup"):
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) * 1024

peak, before, done = [0], anonymous(), threading.Event()
def watch():
    while not done.is_set():
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.002)
thread = threading.Thread(target=watch); thread.start()
module, variables = official.load(sys.argv[1])
done.set(); thread.join()
leaves = [leaf.nbytes for leaf in jax.tree.leaves(variables)]
print(peak[0] - before, sum(leaves), max(leaves))
"""
