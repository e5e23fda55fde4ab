// One translation unit on purpose: libtorch's headers cost ten seconds of a core each time they are read.
#include "attention.cpp"
#include "backend.cpp"
#include "dist.cpp"
#include "linear.cpp"
#include "loss.cpp"
#include "nccl.cpp"
#include "norm_rope.cpp"
#include "training.cpp"
