"""llama.cpp through llama-cpp-python, which may live in another Python: LLAMA_CPP_PYTHON names it.
"""

import ctypes
import sys


def print_errors(level, text, _):
    """llama.cpp's log without its hundreds of lines of less."""
    if level == 4:
        print(text.decode(), file=sys.stderr)


def decoding(file, kind, tokens, threads):
    """Tokens decoded greedily after a prompt of 8 from an fp32 GGUF, which llama.cpp itself first
    quantizes to `kind`, such as MOSTLY_Q8_0 ('': not)."""
    import llama_cpp

    # kept beyond this call: the library logs when it frees a model, too
    decoding.log = llama_cpp.llama_log_callback(print_errors)
    llama_cpp.llama_log_set(decoding.log, None)
    if kind:
        settings = llama_cpp.llama_model_quantize_default_params()
        settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_{kind}")
        names = (file.encode(), f"{file}.{kind}".encode())
        if llama_cpp.llama_model_quantize(*names, ctypes.byref(settings)):
            raise RuntimeError(f"llama.cpp cannot make a {kind} of {file}")
        file = f"{file}.{kind}"
    model = llama_cpp.Llama(file, n_ctx=8 + tokens, n_threads=threads, n_threads_batch=threads,
                            verbose=False)
    while True:
        made = model.generate(list(range(8)), temp=0.0)
        for _ in range(tokens):
            next(made)
        made.close()
        yield tokens
