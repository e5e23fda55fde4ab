//! What the tensors of a model are called and how large they are, as its `config.json` says.

use super::ModelConfig;

/// A linear layer, as an adapter sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinearSpec {
    pub name: String,
    pub inputs: i64,
    pub outputs: i64,
    pub has_bias: bool,
}

impl ModelConfig {
    /// Every linear layer, in the order of the forward.
    pub fn linears(&self) -> Vec<LinearSpec> {
        let (hidden, ffn) = (self.hidden_size, self.intermediate_size);
        let queries = self.num_heads * self.head_dim;
        let keys = self.num_kv_heads * self.head_dim;
        let mut specs = Vec::new();
        for layer in 0..self.num_layers {
            for (name, inputs, outputs, has_bias) in [
                ("self_attn.q_proj", hidden, queries, self.qkv_bias),
                ("self_attn.k_proj", hidden, keys, self.qkv_bias),
                ("self_attn.v_proj", hidden, keys, self.qkv_bias),
                ("self_attn.o_proj", queries, hidden, self.o_bias),
                ("mlp.gate_proj", hidden, ffn, false),
                ("mlp.up_proj", hidden, ffn, false),
                ("mlp.down_proj", ffn, hidden, false),
            ] {
                specs.push(LinearSpec { name: format!("model.layers.{layer}.{name}"), inputs, outputs, has_bias });
            }
        }
        if !self.tie_word_embeddings {
            specs.push(LinearSpec {
                name: "lm_head".into(),
                inputs: hidden,
                outputs: self.vocab_size,
                has_bias: false,
            });
        }
        specs
    }

    /// Every tensor that a checkpoint must have, with its shape.
    pub fn tensors(&self) -> Vec<(String, Vec<i64>)> {
        let mut tensors = vec![
            ("model.embed_tokens.weight".to_owned(), vec![self.vocab_size, self.hidden_size]),
            ("model.norm.weight".to_owned(), vec![self.hidden_size]),
        ];
        for LinearSpec { name, inputs, outputs, has_bias } in self.linears() {
            tensors.extend(has_bias.then(|| (format!("{name}.bias"), vec![outputs])));
            tensors.push((format!("{name}.weight"), vec![outputs, inputs]));
        }
        for layer in 0..self.num_layers {
            let mut norm = |name: &str, size| tensors.push((format!("model.layers.{layer}.{name}.weight"), vec![size]));
            norm("input_layernorm", self.hidden_size);
            norm("post_attention_layernorm", self.hidden_size);
            if self.qk_norm {
                norm("self_attn.q_norm", self.head_dim);
                norm("self_attn.k_norm", self.head_dim);
            }
        }
        tensors.sort_by_key(|(name, _)| self.unit(name));
        tensors
    }

    /// Which part of the model a tensor is of, in the order they are computed: what comes before the blocks is 0, block `i`
    /// is `i + 1`, what comes after them the last.
    pub fn unit(&self, name: &str) -> usize {
        let block = name.strip_prefix("model.layers.").and_then(|rest| rest.split('.').next()?.parse::<usize>().ok());
        match block {
            Some(block) => block + 1,
            None if name.starts_with("model.embed_tokens.") => 0,
            None => self.num_layers as usize + 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::Path;

    use super::*;
    use crate::hf::WeightIndex;

    #[test]
    fn a_config_says_what_is_in_the_weights() {
        let families = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/families");
        for family in ["llama2", "llama3_1", "llama3_2", "llama_bias", "mistral", "qwen2", "qwen3"] {
            let folder = families.join(family);
            let tensors = ModelConfig::read(&folder).unwrap().tensors();
            let index = WeightIndex::open(&folder, &[]).unwrap();
            let found = index.tensors.into_iter();
            let found = found.map(|(name, entry)| (name, entry.shape.iter().map(|size| *size as i64).collect()));
            let expected: BTreeMap<String, Vec<i64>> = tensors.into_iter().collect();
            assert_eq!(found.collect::<BTreeMap<_, _>>(), expected, "{family}");
        }
    }
}
