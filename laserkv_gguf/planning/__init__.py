"""What is asked for and what it takes; without llama.cpp."""
