// Empty: nothing is compiled with tools/cuda-stand-in.
