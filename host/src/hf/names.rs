//! The names that others give the tensors of a Llama, and which Hugging Face names they are: Meta's
//! (`consolidated.00.pth`) and torchtune's, of whole models and of adapters (`adapter_model.pt`).

use std::collections::BTreeMap;

use super::TensorEntry;

/// A name, and the Hugging Face name.
type Names = &'static [(&'static str, &'static str)];

struct Layout {
    whole: Names,
    /// Within `layers.N.`.
    layer: Names,
}

const META: Layout = Layout {
    whole: &[
        ("tok_embeddings.weight", "model.embed_tokens.weight"),
        ("norm.weight", "model.norm.weight"),
        ("output.weight", "lm_head.weight"),
    ],
    layer: &[
        ("attention.wq.weight", "self_attn.q_proj.weight"),
        ("attention.wk.weight", "self_attn.k_proj.weight"),
        ("attention.wv.weight", "self_attn.v_proj.weight"),
        ("attention.wo.weight", "self_attn.o_proj.weight"),
        ("feed_forward.w1.weight", "mlp.gate_proj.weight"),
        ("feed_forward.w2.weight", "mlp.down_proj.weight"),
        ("feed_forward.w3.weight", "mlp.up_proj.weight"),
        ("attention_norm.weight", "input_layernorm.weight"),
        ("ffn_norm.weight", "post_attention_layernorm.weight"),
    ],
};

const TORCHTUNE: Layout = Layout {
    whole: &[
        ("tok_embeddings.weight", "model.embed_tokens.weight"),
        ("norm.scale", "model.norm.weight"),
        ("output.weight", "lm_head.weight"),
    ],
    layer: &[
        ("attn.q_proj.weight", "self_attn.q_proj.weight"),
        ("attn.k_proj.weight", "self_attn.k_proj.weight"),
        ("attn.v_proj.weight", "self_attn.v_proj.weight"),
        ("attn.output_proj.weight", "self_attn.o_proj.weight"),
        ("attn.q_proj.bias", "self_attn.q_proj.bias"),
        ("attn.k_proj.bias", "self_attn.k_proj.bias"),
        ("attn.v_proj.bias", "self_attn.v_proj.bias"),
        ("attn.q_norm.scale", "self_attn.q_norm.weight"),
        ("attn.k_norm.scale", "self_attn.k_norm.weight"),
        ("mlp.w1.weight", "mlp.gate_proj.weight"),
        ("mlp.w2.weight", "mlp.down_proj.weight"),
        ("mlp.w3.weight", "mlp.up_proj.weight"),
        ("sa_norm.scale", "input_layernorm.weight"),
        ("mlp_norm.scale", "post_attention_layernorm.weight"),
    ],
};

impl Layout {
    fn rename(&self, name: &str) -> Option<String> {
        let look_up = |names: Names, name: &str| names.iter().find(|(from, _)| *from == name).map(|(_, to)| *to);
        if let Some(to) = look_up(self.whole, name) {
            return Some(to.to_owned());
        }
        let (layer, rest) = name.strip_prefix("layers.")?.split_once('.')?;
        Some(format!("model.layers.{layer}.{}", look_up(self.layer, rest)?))
    }

    /// `lora_a` and `lora_b` of a layer, as PEFT calls them.
    fn rename_factor(&self, name: &str) -> Option<String> {
        let (layer, factor) = name.strip_suffix(".weight")?.rsplit_once('.')?;
        let factor = match factor {
            "lora_a" => "lora_A",
            "lora_b" => "lora_B",
            _ => return None,
        };
        let renamed = self.rename(&format!("{layer}.weight"))?;
        Some(format!("base_model.model.{}.{factor}.weight", renamed.strip_suffix(".weight")?))
    }
}

/// The rows of queries and keys are the ones that are rotated in pairs.
fn is_rotated(name: &str) -> bool {
    name.contains("self_attn.q_proj.") || name.contains("self_attn.k_proj.")
}

/// Gives a checkpoint with Meta's or torchtune's names Hugging Face's; leaves any other as it is.
pub fn rename(tensors: &mut BTreeMap<String, TensorEntry>) {
    let (layout, is_paired) = if tensors.contains_key("layers.0.attention.wq.weight") {
        (META, true)
    } else if tensors.contains_key("layers.0.attn.q_proj.weight") {
        // torchtune has Meta's order of rows, but for the Qwens, which it loads as they are.
        let is_qwen = ["layers.0.attn.q_proj.bias", "layers.0.attn.q_norm.scale"];
        (TORCHTUNE, !is_qwen.iter().any(|name| tensors.contains_key(*name)))
    } else {
        return;
    };
    for (name, mut entry) in std::mem::take(tensors) {
        // Frequencies are computed from the config, as everywhere.
        if name == "rope.freqs" {
            continue;
        }
        let renamed = layout.rename(&name);
        entry.paired_rows = is_paired && renamed.as_deref().is_some_and(is_rotated);
        tensors.insert(renamed.unwrap_or(name), entry);
    }
}

/// Gives torchtune's adapter PEFT's names; `is_paired` says whether its model has Meta's order of rows. Leaves any other
/// as it is.
pub fn rename_adapter(tensors: &mut BTreeMap<String, TensorEntry>, is_paired: bool) {
    for (name, mut entry) in std::mem::take(tensors) {
        let renamed = TORCHTUNE.rename_factor(&name);
        let has_rows = |name: &str| is_rotated(name) && name.contains(".lora_B.");
        entry.paired_rows = is_paired && renamed.as_deref().is_some_and(has_rows);
        tensors.insert(renamed.unwrap_or(name), entry);
    }
}
