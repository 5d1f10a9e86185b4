"""The legend of axis names. Signatures spell shapes with jaxtyping, `Float[Tensor, "tokens dim"]`, in these words only.

| axis | meaning |
| --- | --- |
| batch | sequences in a batch |
| length | positions in a sequence |
| keys | positions that a query can look at (cached and new) |
| tokens | positions of all sequences, flattened: batch * length |
| units | routing units: tokens, segments, sequences or tasks |
| segments | equal stretches of a sequence, the last of which may be shorter |
| rows | (token, chosen expert) pairs, sorted by expert |
| dim | width of the residual stream, `hidden_size` |
| heads, kv_heads | attention heads; heads of keys and values |
| head_dim | width of one head |
| latent | width of MLA's compressed keys and values, `kv_lora_rank` |
| rope | width of the rotated part of a head |
| ff | intermediate width of one FFN or expert |
| experts | routed experts, `n_routed_experts` |
| out | width of what a linear map gives, where it is neither dim nor ff |
| columns | columns of an expert's matrix with its bias as the last: dim + 1 |
| rank | components of factorised experts; left, right: ranks on the sides of an expert's core |
| k | experts chosen per unit, `num_experts_per_tok` |
| groups | groups of experts (devices), `n_group` |
| sequences | sequences over which balance is measured |
| layers | MoE layers |
| labels | classes of a sequence, `num_labels` |
| vocab | entries of the vocabulary |
"""
