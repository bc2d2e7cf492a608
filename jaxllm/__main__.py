"""`python -m jaxllm`, the same as `jaxllm`."""
import sys

from jaxllm.cli import main

sys.exit(main())
