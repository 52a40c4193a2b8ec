"""Where the backends may compute in bfloat16 and float16, and why nothing is lost there.

Numbers are lines of a function. A line more, or another function, is an error until a rule says why it is none.
"""

from __future__ import annotations

from tests.parity.precision import ACCUMULATION, ANYWHERE, ELEMENTWISE, INTEGER, PRODUCT, ROUNDING, SUM, Rule

PRODUCTS = "devices sum products of narrow factors in float32, and round a result once"
RESIDUAL = "the residual stream is of the compute dtype: one rounding per sum of two"
GATED = "of two factors, which are narrow: one rounding"
BIAS = "a bias added to a product: one rounding of a sum of two"
ONCE = "computed in at least float32; the result, an activation, is rounded once"
INPUT = "an input takes the compute dtype"
GRADIENT = "the gradient of a narrow activation that the forward pass widens here is rounded once"
COTANGENTS = "gradients of the few uses of one value are added in its dtype"
LOSSLESS = "widened so that its gradient is summed in float32, and back: nothing is rounded"
SCALED = "gradients that were found along with the loss take its scale in float32, and are rounded once"
NUMBERS = "16 bits number the experts, of which there are as many at most"
WIDE_INSIDE = "torch computes this in float32 inside, and rounds the result once"

RULES: dict[str, tuple[Rule, ...]] = {
    "jax": (
        Rule(
            PRODUCT,
            PRODUCTS,
            {
                "model.linear:linear": 1,
                "model.attention:_attention": 1,
                "model.grouped:looped_matmul.block": 1,
                "model.grouped:tiled_matmul": 1,
                "model.grouped:ragged_matmul": 1,
                "model.grouped:ragged_outer": 1,
            },
        ),
        Rule(
            PRODUCT,
            PRODUCTS,
            {"model.grouped:grouped_matmul": 1, "model.attention:attention_weights": 1},
            backward=True,
        ),
        Rule(ELEMENTWISE, BIAS, {"model.linear:linear": 1}, ("add",)),
        Rule(
            ELEMENTWISE,
            GATED,
            {"model.mlp:SwiGLUMLP.forward": 1, "model.mlp:GEGLUMLP.forward": 1, "model.experts:apply_packed": 1},
            ("mul",),
        ),
        Rule(
            ELEMENTWISE,
            RESIDUAL,
            {
                "model.block:TransformerBlock._added": 1,
                "model.cross_attention:CrossAttentionBlock.forward": 2,
                "model.mot:MoTBlock.forward": 2,
                "model.moma:MoMaBlock.forward": 2,
                "model.vision:VisionBlock.forward": 2,
                "model.vision:VisionTower.forward": 1,
            },
            ("add",),
        ),
        Rule(ELEMENTWISE, COTANGENTS, {ANYWHERE: 0}, ("add_any",), backward=True),
        Rule(ACCUMULATION, RESIDUAL, {"model.scan:run_blocks": 1}),
        Rule(
            ROUNDING,
            ONCE,
            {
                "model.norm:RMSNorm.forward": 1,
                "model.norm:LayerNorm.forward": 1,
                "model.position:apply_rope": 1,
                "model.attention:_attention": 1,
                "model.mlp:_widened": 1,
                "model.factors:scaled": 1,
                "model.factors:divided": 1,
                "model.softcap:soft_capped": 1,
                "model.adapter:_mean_of_real": 1,
                "model.moe:MoEMLP.forward": 1,
                "model.expert_choice:ExpertChoiceMoE.forward": 1,
                "model.vision:quick_gelu": 1,
                "model.vision:gelu_tanh": 1,
                "model.grouped:looped_outer.group": 1,
                "model.grouped:tiled_outer": 1,
            },
        ),
        Rule(
            ROUNDING,
            INPUT,
            {
                "model.vision:VisionTower.forward": 1,
                "model.vlm:VLMWrapper.encode_images": 1,
                "training.objective:compute_copy": 1,
            },
        ),
        Rule(ROUNDING, LOSSLESS, {"model.linear:broadcast": 1, "model.mot:_repeated": 1}),
        Rule(
            ROUNDING,
            GRADIENT,
            {
                "model.factors:_wide": 1,
                "model.moe:MoEMLP._shared": 1,
                "model.norm:RMSNorm.forward": 1,
                "model.norm:RMSNorm.factor": 1,
                "model.norm:LayerNorm.forward": 2,
                "model.position:apply_rope": 1,
                "model.attention:attention_weights": 1,
                "model.adapter:_mean_of_real": 1,
                "model.moe:MoEMLP.forward": 1,
                "model.dispatch:dispatch": 1,
                "model.grouped:grouped_matmul": 1,
                "model.dispatch:combine": 1,
                "model.expert_choice:ExpertChoiceMoE.forward": 1,
                "model.router:Gate.forward": 1,
                "training.loss:_summed": 1,
                "model.vision:quick_gelu": 1,
                "model.vision:gelu_tanh": 1,
            },
            backward=True,
        ),
        Rule(
            ROUNDING,
            "summed in float32 over all uses of a row, or of a parameter, and rounded once",
            {"model.linear:Embedding.forward": 1, "model.linear:broadcast": 1, "model.mot:_repeated": 1},
            backward=True,
        ),
        Rule(ROUNDING, SCALED, {"training.head:loss_in_chunks": 1}, backward=True),
    ),
    "torch": (
        Rule(INTEGER, NUMBERS, {"model.dispatch:_sorted": 2}),
        Rule(INTEGER, "the bits of bfloat16 numbers, which NumPy lacks", {"model.state:from_numpy": 1}),
        Rule(
            PRODUCT,
            PRODUCTS,
            {
                "model.linear:linear": 1,
                "model.attention:_attend": 1,
                "model.attention:_attend_plainly": 1,
                "model.grouped:looped_matmul": 1,
                "model.grouped:looped_outer": 1,
                "model.grouped:tiled_matmul": 1,
                "model.vision:VisionAttention.forward": 2,
                "model.vision:VisionMLP.forward": 1,
                "model.vision:VisionTower.forward": 1,
                "model.adapter:MLP2LayerAdapter.forward": 1,
                "model.adapter:LinearAdapter.forward": 1,
                "model.adapter:AvgPoolAdapter.forward": 1,
                "model.adapter:AttentionalPoolAdapter.forward": 3,
            },
        ),
        Rule(ELEMENTWISE, BIAS, {"model.linear:linear": 1}, ("add",)),
        Rule(
            ELEMENTWISE,
            WIDE_INSIDE,
            {
                "model.mlp:SwiGLUMLP.forward": 1,
                "model.mlp:GEGLUMLP.forward": 1,
                "model.mlp:StandardMLP.forward": 1,
                "model.adapter:MLP2LayerAdapter.forward": 1,
                "model.vision:VisionMLP.forward": 1,
                "model.experts:apply_packed": 2,
            },
            ("silu", "gelu", "silu_backward", "gelu_backward"),
        ),
        Rule(ELEMENTWISE, WIDE_INSIDE, {"model.factors:scaled": 1, "model.factors:divided": 1}, ("mul", "div")),
        Rule(
            ELEMENTWISE,
            GATED,
            {"model.mlp:SwiGLUMLP.forward": 0, "model.mlp:GEGLUMLP.forward": 0, "model.experts:apply_packed": 0},
            ("mul",),
        ),
        Rule(ELEMENTWISE, SCALED, {"training.head:_Sum.backward": 2}, ("mul",), backward=True),
        Rule(PRODUCT, PRODUCTS, {"training.head:_chunk": 1}, backward=True),
        Rule(
            ELEMENTWISE,
            RESIDUAL,
            {
                "model.block:TransformerBlock._added": 1,
                "model.cross_attention:CrossAttentionBlock.forward": 2,
                "model.mot:MoTBlock.forward": 3,
                "model.moma:MoMaBlock.forward": 2,
                "model.vision:VisionBlock.forward": 2,
                "model.vision:VisionTower.forward": 1,
            },
            ("add",),
        ),
        Rule(ELEMENTWISE, COTANGENTS, {ANYWHERE: 0}, ("add_any",), backward=True),
        Rule(
            ROUNDING,
            ONCE,
            {
                "model.norm:RMSNorm.forward": 1,
                "model.norm:LayerNorm.forward": 1,
                "model.position:apply_rope": 1,
                "model.attention:_attend": 1,
                "model.attention:_attend_plainly": 1,
                "model.softcap:soft_capped": 1,
                "model.adapter:_mean_of_real": 1,
                "model.moe:MoEMLP.forward": 1,
                "model.expert_choice:ExpertChoiceMoE.forward": 1,
                "model.vision:quick_gelu": 1,
                "model.grouped:tiled_outer": 1,
                "model.linear:_matrix_times_vector": 1,
            },
        ),
        Rule(
            ROUNDING,
            INPUT,
            {
                "model.vision:VisionTower.forward": 1,
                "model.vlm:VLMWrapper.encode_images": 1,
                "training.mixed_precision:_copy": 1,
            },
        ),
        Rule(
            ROUNDING,
            GRADIENT,
            {
                "model.norm:RMSNorm.forward": 1,
                "model.norm:RMSNorm.factor": 1,
                "model.moe:MoEMLP._shared": 1,
                "model.norm:LayerNorm.forward": 1,
                "model.position:apply_rope": 1,
                "model.adapter:_mean_of_real": 1,
                "model.moe:MoEMLP.forward": 1,
                "model.expert_choice:ExpertChoiceMoE.forward": 1,
                "model.router:Gate.forward": 1,
                "model.attention:attention_weights": 2,
                "model.dispatch:combine": 1,
                "training.loss:_summed": 1,
                "training.head:_chunk": 1,
                "model.vision:quick_gelu": 1,
            },
            backward=True,
        ),
        Rule(
            ROUNDING,
            "summed in float32 over all uses of a row, and rounded once",
            {"model.linear:_LookUp.backward": 1},
            backward=True,
        ),
        Rule(
            SUM,
            "gradients of what is used at many places: torch sums them in float32 inside, and rounds once",
            {
                "model.linear:linear": 1,
                "model.vision:VisionAttention.forward": 2,
                "model.vision:VisionMLP.forward": 1,
                "model.vision:VisionTower.forward": 3,
                "model.adapter:MLP2LayerAdapter.forward": 1,
                "model.adapter:LinearAdapter.forward": 1,
                "model.adapter:AvgPoolAdapter.forward": 1,
                "model.adapter:AttentionalPoolAdapter.forward": 2,
                "model.mot:MoTAttention._heads": 1,
                "model.dispatch:_DispatchTokens.backward": 1,
            },
            ("sum",),
            backward=True,
        ),
        Rule(
            SUM,
            "places that occur once: one term each",
            {"model.expert_choice:ExpertChoiceMoE.forward": 1},
            ("index_put", "scatter_add"),
            backward=True,
        ),
    ),
}
