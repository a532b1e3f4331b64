"""Every kind of loss an engine must be exact on: name to a function that makes it."""

from __future__ import annotations

from collections.abc import Callable

from tests.zoo import control as zoo_control
from tests.zoo import joined as zoo_joined
from tests.zoo import linear as zoo_linear
from tests.zoo import models as zoo_models
from tests.zoo import params as zoo_params
from tests.zoo import views as zoo_views
from tests.zoo.core import Case

_PARTS = [zoo_linear, zoo_params, zoo_views, zoo_control, zoo_models, zoo_joined]
ZOO: dict[str, Callable[[], Case]] = {
    name: make for part in _PARTS for name, make in part.CASES.items()
}
if len(ZOO) != sum(len(part.CASES) for part in _PARTS):
    raise ValueError("two parts of the zoo use one name")

# Cases with a near twin, by name, for the slow set only: compiling takes the time.
_TWINS = """
dense_rank4 | dense_left_matrix | dense_inner_product | dense_high_precision |
dense_no_contraction | dense_full_contraction | dense_three_layers |
dense_of_integers | einsum ti,oi->to | einsum hti,hio->to | einsum thd,ohd->to |
einsum ti,i->ti | einsum ti,t->ti | einsum i,o->io | einsum htgi,ghio->thgo |
einsum ti,io->o | einsum two_data ti,tj,ijo->to | einsum weight_first io,ti->to |
conv_1d_causal | conv_strided_same | conv_stride_skips_pixels | conv_grouped |
conv_depthwise | conv_depthwise_1d | conv_nchw | conv_1x1 | conv_kernel_covers_input
| conv_kernel_exceeds_input | conv_explicit_padding | conv_transposed_kernel |
conv_flipped_kernel | conv_then_max_pool_ties | conv_by_patches |
conv_numpy_convolve | embedding_index | embedding_take | embedding_wrap |
embedding_drop | embedding_unsigned_ids | embedding_promised_in_bounds |
embedding_scalar_id | embedding_rank3_table | embedding_middle_axis |
embedding_scaled | embedding_bag | embedding_positions | embedding_transformed_table
| embedding_scatter_overwrites | embedding_segments | tied_einsum | tied_contracting
| tied_transposed | slice_rows | slice_negative | slice_of_transpose |
slice_dynamic_static_start | slice_dynamic_by_data | slice_matrix | slice_row |
slices_disjoint | reshaped_from_vector | reshaped | transposed | expanded | squeezed
| rolled | repeated | tiled | concatenated_outputs | stacked_with_itself |
diagonal_only | lower_triangle | masked_by_where | kron | scaled | negated |
scaled_by_a_constant_array | scaled_by_columns | scaled_by_a_learnt_norm |
stop_gradient_straight_through | added_to_a_constant | interpolated |
spectral_power_iteration | lora_scaled | softplus_weight | maximum_weight |
where_on_a_weight | clipped_weight | sorted_weight | normalised_rows | symmetrised |
skew_cayley | solve_against_data | matrix_power | mixture_weights | complex_polar |
shared_thrice | shared_same_activations | shared_unlike_layouts |
shared_scaled_unlike | shared_dense_and_nonlinear | shared_bias |
unused_by_zero_gradient | used_only_in_an_argmax | nested_tree | l1_regulariser |
l2_regulariser_times_data | group_lasso | orthogonality_regulariser | bias_whole |
bias_size_one_axis | bias_of_length_one | bias_broadcast_by_hand | scale_only |
scale_exponent | scale_prelu | scale_of_the_loss | scale_swish_beta |
scale_select_by_data | scale_clamp_by_parameters | scale_threshold_of_data |
random_dropout | random_keys_split | random_bayesian_layer | scan_elman_unrolled |
scan_elman_one_step | scan_gru | scan_lstm | scan_lstm_reversed |
scan_lstm_both_ways_tied | scan_lstm_two_layers | scan_lookup_inside |
scan_initial_state | scan_weight_changes_in_the_carry | scan_rows_of_a_weight |
scan_weight_by_counter | scan_with_integer_carry | scan_bias_and_scale_inside |
stack_scanned_vector | stack_scanned_unrolled | stack_scanned_last_axis |
stack_scanned_built_by_stacking | stack_with_data_each_layer | stack_nested_stack |
remat_block | remat_dense | remat_closure | remat_around_a_scan |
remat_of_parameters_only | jit_of_parameters_only | jit_called_twice | cond_operands
| cond_one_branch_constant | cond_same_weight_both | cond_chooses_a_weight |
cond_around_scan | switch_experts | fori_loop | map_over_tokens_batched |
map_over_weights | vmap_over_tokens | custom_jvp_of_data | custom_vjp_of_parameters
| custom_vjp_signs | custom_vjp_inside_remat | custom_vjp_closes_over_parameters |
laplacian | odd_rfft_between | odd_segment_max | odd_sort_outputs | odd_top_k |
odd_argmax_gathers | odd_max_ties | odd_logsumexp | odd_qr | odd_determinant |
odd_reduce_product | odd_rounding | odd_integer_power | odd_cross_and_trace |
odd_vectorized_norm | odd_pairwise_distances | odd_interpolation_table |
odd_erf_gamma | odd_cumulative | attention | attention_padded | attention_fused |
attention_shared_keys_values | attention_rank3_kernels | attention_rotary |
attention_relative_bias | norm_rms | norm_rms_one_plus | norm_query_key |
transformer_block | swiglu | mixture_of_experts | mixture_of_experts_dispatched |
autoencoder_tied | siamese | contrastive | deep_sets | cross_entropy | ctc |
views_by_scan | views_random | views_of_images | linen_mlp | linen_bidirectional_gru
| linen_scan_stack_axis1 | linen_norms | linen_vmapped_ensemble | equinox_mlp |
equinox_gru | equinox_attention | haiku_lstm | haiku_cnn | view_conv_sliced_channels
| view_conv_transposed | view_conv_grouped_outputs_reshaped | view_conv_scaled |
view_conv_vmapped_over_images | view_conv_vmapped_over_kernels |
view_conv_gradient_strided | view_conv_tangent_inside | view_conv_in_and_out_swapped
| view_rows_of_a_reshape | view_rows_of_a_flat_table | view_rows_strided |
view_rows_of_two_halves | view_rows_of_some_columns | view_rows_scaled_unlike |
view_rows_all_the_same | view_rows_vmapped_one_id_list | view_row_dynamic_negative |
view_tied_with_a_dense_layer | view_rows_merged_turned | view_stack_sliced |
view_stack_scanned_twice | view_stack_from_a_matrix | view_stack_last_axis_turned |
view_stack_batched_in_the_body | view_loop_of_one_turn | view_stack_of_transposes |
view_loop_and_outside | view_stack_strided | view_einsum_merged_axes |
view_einsum_split_axis | view_interleaved_columns | view_cast_up_and_down |
view_quarters | wide_conv_strided_dilated | wide_stack | wide_shared_transposed |
wide_batched_weights | long_shared_transposed | long_scan | long_conv_grouped |
wide_scan | type_legacy_keys | type_bytes_and_flags | none_of_the_turns |
none_of_a_leaf | remat_nested | jit_nested | jit_returns_both | cond_by_parameters |
linen_lstm | haiku_layer_stack | equinox_cnn | nnx_pure_dict | scan_gru_reversed |
scan_lstm_of_embeddings | stack_nested_recurrence | attention_multi_query |
attention_query_parameter | linen_cnn | conv_nchw_grouped_strided |
conv_batch_groups | conv_shared_unlike_strides | mixture_of_experts_gathered |
fft_of_a_filter | complex_from_two_reals | cholesky_factor | views_by_loop |
norm_group | odd_gaussian_mixture | random_dropconnect | joined_inputs |
joined_left_inputs | joined_turned_pieces | joined_with_what_is_squared | joined_twice |
joined_crosswise | joined_as_a_batch | joined_heads | joined_and_apart |
joined_backwards | joined_biases | joined_tables | joined_conv_outputs |
joined_conv_windows | joined_before_a_loop | joined_layers | backwards_outputs |
backwards_twice | backwards_of_a_reshape | backwards_then_reshaped |
backwards_and_forwards | backwards_rows | backwards_columns_of_rows |
backwards_window_strided | linen_conv_transpose_turned
"""
TWINS = {name.strip() for name in _TWINS.replace("\n", " ").split("|")}
if TWINS - set(ZOO):
    raise ValueError(f"no such cases: {sorted(TWINS - set(ZOO))}")
