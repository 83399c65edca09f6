"""The only part of the package that knows llama.cpp."""

import os

# Where llama.cpp ends the process, it starts a debugger first, for seconds and pages of stack. It
# looks for this when its libraries are loaded, which no module does before this one has run.
os.environ.setdefault("GGML_NO_BACKTRACE", "1")
