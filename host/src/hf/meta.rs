//! Meta's names for the tensors of a Llama (`consolidated.00.pth`), and which Hugging Face names they are.

use std::collections::BTreeMap;

use super::TensorEntry;

const WHOLE: [(&str, &str); 3] = [
    ("tok_embeddings.weight", "model.embed_tokens.weight"),
    ("norm.weight", "model.norm.weight"),
    ("output.weight", "lm_head.weight"),
];

/// Within `layers.N.`; the last says whether rotary pairs lie side by side.
const LAYER: [(&str, &str, bool); 9] = [
    ("attention.wq.weight", "self_attn.q_proj.weight", true),
    ("attention.wk.weight", "self_attn.k_proj.weight", true),
    ("attention.wv.weight", "self_attn.v_proj.weight", false),
    ("attention.wo.weight", "self_attn.o_proj.weight", false),
    ("feed_forward.w1.weight", "mlp.gate_proj.weight", false),
    ("feed_forward.w2.weight", "mlp.down_proj.weight", false),
    ("feed_forward.w3.weight", "mlp.up_proj.weight", false),
    ("attention_norm.weight", "input_layernorm.weight", false),
    ("ffn_norm.weight", "post_attention_layernorm.weight", false),
];

/// Gives a checkpoint with Meta's names Hugging Face's; leaves any other as it is.
pub fn rename(tensors: &mut BTreeMap<String, TensorEntry>) {
    if !tensors.contains_key("layers.0.attention.wq.weight") {
        return;
    }
    for (name, mut entry) in std::mem::take(tensors) {
        // Frequencies are computed from the config, as everywhere.
        if name == "rope.freqs" {
            continue;
        }
        let (name, paired_rows) = renamed(&name).unwrap_or((name, false));
        entry.paired_rows = paired_rows;
        tensors.insert(name, entry);
    }
}

fn renamed(name: &str) -> Option<(String, bool)> {
    if let Some((_, to)) = WHOLE.iter().find(|(from, _)| *from == name) {
        return Some(((*to).to_owned(), false));
    }
    let (layer, rest) = name.strip_prefix("layers.")?.split_once('.')?;
    let (_, to, paired) = LAYER.iter().find(|(from, _, _)| *from == rest)?;
    Some((format!("model.layers.{layer}.{to}"), *paired))
}
