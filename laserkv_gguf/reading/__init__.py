"""A document becomes kept cells: the block loop of LASER-KV."""
