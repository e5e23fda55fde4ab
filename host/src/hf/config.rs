//! The shape of a model, from its `config.json`. A family is code, a size is data: nothing here has a default that a
//! checkpoint could contradict.

use std::path::Path;

use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// A decoder of the Llama family: Llama, Mistral, Qwen 2 and 3 differ in what the flags say.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    pub architecture: String,
    pub vocab_size: i64,
    pub hidden_size: i64,
    pub intermediate_size: i64,
    pub num_layers: i64,
    pub num_heads: i64,
    pub num_kv_heads: i64,
    pub head_dim: i64,
    pub rms_norm_eps: f64,
    pub rope_theta: f64,
    pub rope_scaling: Option<RopeScaling>,
    pub max_position_embeddings: i64,
    pub tie_word_embeddings: bool,
    /// Biases on the query, key and value projections.
    pub qkv_bias: bool,
    /// A bias on the output projection of attention.
    pub o_bias: bool,
    /// Each head's queries and keys are normalised before they are rotated.
    pub qk_norm: bool,
    /// Attention reaches this many tokens back; no longer sequence is computed.
    pub sliding_window: Option<i64>,
}

/// Llama 3.1's stretching of the rotary frequencies (parity §3.2).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RopeScaling {
    pub factor: f64,
    pub low_freq_factor: f64,
    pub high_freq_factor: f64,
    pub original_max_position_embeddings: f64,
}

/// Architectures that `model::registry` builds.
pub const ARCHITECTURES: &[&str] = &["LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"];

/// The folder with a model's configs: the one with its weights, but for Meta's, which are in `original/` below it.
pub fn config_folder(dir: &Path) -> &Path {
    let above = dir.parent().filter(|above| {
        dir.file_name().is_some_and(|name| name == "original")
            && !dir.join("config.json").exists()
            && above.join("config.json").exists()
    });
    above.unwrap_or(dir)
}

impl ModelConfig {
    /// Reads `dir/config.json`.
    pub fn read(dir: &Path) -> Result<Self> {
        let path = config_folder(dir).join("config.json");
        let text = std::fs::read_to_string(&path).map_err(|error| {
            let what = format!("cannot read `config.json` of the model folder `{}`", dir.display());
            Error::config(what).cause(error).hint(
                "`checkpointer.checkpoint_dir` must be a Hugging Face model folder: config.json, tokenizer files, weights",
            )
        })?;
        Self::parse(&text).map_err(|error| error.at_file(path))
    }

    /// Whether torchtune's builder of this family has the rows of queries and keys in Meta's order, the two halves of a
    /// rotary pair side by side: it leaves the Qwens as they are.
    pub fn is_paired_in_torchtune(&self) -> bool {
        !self.architecture.starts_with("Qwen")
    }

    /// Parses the text of a `config.json`.
    pub fn parse(text: &str) -> Result<Self> {
        let value: Value = serde_json::from_str(text)
            .map_err(|error| Error::config("`config.json` is not valid JSON").cause(error))?;
        let Value::Object(map) = value else {
            return Err(Error::config("`config.json` does not hold a JSON object"));
        };
        Reader(&map).model()
    }
}

struct Reader<'a>(&'a Map<String, Value>);

impl Reader<'_> {
    fn model(&self) -> Result<ModelConfig> {
        let architecture = self.architecture()?;
        self.refuse_unread()?;
        let (qwen2, qwen3) = (architecture == "Qwen2ForCausalLM", architecture == "Qwen3ForCausalLM");
        let attention_bias = self.flag("attention_bias")?;
        let hidden_size = self.positive("hidden_size")?;
        let num_heads = self.positive("num_attention_heads")?;
        let num_kv_heads = self.optional_positive("num_key_value_heads")?.unwrap_or(num_heads);
        if num_heads % num_kv_heads != 0 {
            let what =
                format!("`num_attention_heads` {num_heads} is no multiple of `num_key_value_heads` {num_kv_heads}");
            return Err(Error::config(what));
        }
        let head_dim = match self.optional_positive("head_dim")? {
            Some(size) => size,
            None if hidden_size % num_heads == 0 => hidden_size / num_heads,
            None => {
                let what = format!("`hidden_size` {hidden_size} is no multiple of `num_attention_heads` {num_heads}");
                return Err(Error::config(what));
            }
        };
        if head_dim % 2 != 0 {
            return Err(Error::config(format!("`head_dim` {head_dim} is odd; rotary embeddings need pairs")));
        }
        Ok(ModelConfig {
            architecture,
            vocab_size: self.positive("vocab_size")?,
            hidden_size,
            intermediate_size: self.positive("intermediate_size")?,
            num_layers: self.positive("num_hidden_layers")?,
            num_heads,
            num_kv_heads,
            head_dim,
            rms_norm_eps: self.number("rms_norm_eps")?.unwrap_or(1e-6),
            rope_theta: self.rope_theta()?,
            rope_scaling: self.rope_scaling()?,
            max_position_embeddings: self.optional_positive("max_position_embeddings")?.unwrap_or(2048),
            tie_word_embeddings: self.flag("tie_word_embeddings")?,
            qkv_bias: qwen2 || attention_bias,
            o_bias: !qwen2 && attention_bias,
            qk_norm: qwen3,
            sliding_window: self.sliding_window(qwen2 || qwen3)?,
        })
    }

    /// Mistral's window is on when it has a size; Qwen's only with `use_sliding_window`.
    fn sliding_window(&self, by_flag: bool) -> Result<Option<i64>> {
        if by_flag && !self.flag("use_sliding_window")? { Ok(None) } else { self.optional_positive("sliding_window") }
    }

    fn architecture(&self) -> Result<String> {
        let named = self.0.get("architectures").and_then(|list| list.get(0)).and_then(Value::as_str);
        match named {
            Some(name) if ARCHITECTURES.contains(&name) => Ok(name.to_owned()),
            Some(name) => Err(Error::config(format!("the architecture `{name}` is not one that `host` builds"))
                .hint(format!("architectures built so far: {}", ARCHITECTURES.join(", ")))),
            None => Err(Error::config("`config.json` names no architecture")
                .hint("it needs `\"architectures\": [\"LlamaForCausalLM\"]` or another that `host` builds")),
        }
    }

    /// What the Llama block does not compute must be absent or off: nothing is dropped in silence.
    fn refuse_unread(&self) -> Result<()> {
        if self.flag("mlp_bias")? {
            return Err(Error::config("`mlp_bias: true` is not built for this architecture yet"));
        }
        match self.0.get("hidden_act").and_then(Value::as_str) {
            None | Some("silu") => Ok(()),
            Some(other) => Err(Error::config(format!("`hidden_act` is `{other}`, the Llama family computes `silu`"))),
        }
    }

    /// The rotary section: transformers 5 writes `rope_parameters`, earlier ones `rope_scaling` and `rope_theta`; of both
    /// it takes `rope_scaling`.
    fn rope_section(&self) -> Result<Option<&Map<String, Value>>> {
        for key in ["rope_scaling", "rope_parameters"] {
            match self.0.get(key) {
                None | Some(Value::Null) => {}
                Some(Value::Object(section)) => return Ok(Some(section)),
                Some(other) => return Err(Error::config(format!("`{key}` must be an object, found {other}"))),
            }
        }
        Ok(None)
    }

    fn rope_theta(&self) -> Result<f64> {
        if let Some(theta) = self.number("rope_theta")? {
            return Ok(theta);
        }
        let in_section = |key: &str| self.0.get(key).and_then(|section| section.get("rope_theta"));
        match in_section("rope_scaling").or_else(|| in_section("rope_parameters")) {
            None | Some(Value::Null) => Ok(10_000.0),
            Some(theta) => theta
                .as_f64()
                .filter(|theta| *theta > 0.0)
                .ok_or_else(|| Error::config(format!("`rope_theta` must be a number above 0, found {theta}"))),
        }
    }

    fn rope_scaling(&self) -> Result<Option<RopeScaling>> {
        let Some(section) = self.rope_section()? else { return Ok(None) };
        let kind =
            section.get("rope_type").or_else(|| section.get("type")).and_then(Value::as_str).unwrap_or("default");
        match kind {
            "default" => Ok(None),
            "llama3" => {
                let field = |name: &str| {
                    section.get(name).and_then(Value::as_f64).filter(|value| *value > 0.0).ok_or_else(|| {
                        Error::config(format!("the rotary scaling `llama3` needs a positive number `{name}`"))
                    })
                };
                Ok(Some(RopeScaling {
                    factor: field("factor")?,
                    low_freq_factor: field("low_freq_factor")?,
                    high_freq_factor: field("high_freq_factor")?,
                    original_max_position_embeddings: field("original_max_position_embeddings")?,
                }))
            }
            other => Err(Error::config(format!("the rotary scaling `{other}` is not built yet"))
                .hint("scalings built so far: default, llama3")),
        }
    }

    fn positive(&self, key: &str) -> Result<i64> {
        self.optional_positive(key)?.ok_or_else(|| Error::config(format!("`config.json` lacks `{key}`")))
    }

    fn optional_positive(&self, key: &str) -> Result<Option<i64>> {
        match self.0.get(key) {
            None | Some(Value::Null) => Ok(None),
            // The bound keeps products of two sizes inside an i64 whatever the file says.
            Some(value) => match value.as_i64() {
                Some(number) if (1..=1 << 30).contains(&number) => Ok(Some(number)),
                _ => Err(Error::config(format!("`{key}` is {value}, a positive integer is needed"))),
            },
        }
    }

    fn number(&self, key: &str) -> Result<Option<f64>> {
        match self.0.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => match value.as_f64().filter(|number| *number > 0.0) {
                Some(number) => Ok(Some(number)),
                None => Err(Error::config(format!("`{key}` is {value}, a positive number is needed"))),
            },
        }
    }

    fn flag(&self, key: &str) -> Result<bool> {
        match self.0.get(key) {
            None | Some(Value::Null) => Ok(false),
            Some(Value::Bool(value)) => Ok(*value),
            Some(value) => Err(Error::config(format!("`{key}` is {value}, `true` or `false` is needed"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TINY: &str = r#"{"architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 96,
        "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "vocab_size": 100"#;

    fn parse(rest: &str) -> Result<ModelConfig> {
        ModelConfig::parse(&format!("{TINY}{rest}}}"))
    }

    #[test]
    fn derives_what_llama_leaves_out() {
        let config = parse("").unwrap();
        assert_eq!((config.head_dim, config.num_kv_heads, config.rope_theta), (16, 2, 10_000.0));
        assert!(!config.tie_word_embeddings && config.rope_scaling.is_none());
    }

    #[test]
    fn reads_both_spellings_of_the_rotary_section() {
        let body = r#""factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3""#;
        let old = parse(&format!(r#", "rope_theta": 500000.0, "rope_scaling": {{{body}}}"#)).unwrap();
        let new = parse(&format!(r#", "rope_parameters": {{"rope_theta": 500000.0, {body}}}"#)).unwrap();
        assert_eq!(old, new);
        assert_eq!(old.rope_scaling.unwrap().factor, 8.0);
    }

    #[test]
    fn refuses_what_it_would_have_to_ignore() {
        let message = |rest: &str| parse(rest).unwrap_err().message;
        assert!(message(r#", "mlp_bias": true"#).contains("mlp_bias"));
        assert!(message(r#", "hidden_act": "gelu""#).contains("gelu"));
        assert!(message(r#", "rope_scaling": {"rope_type": "yarn"}"#).contains("yarn"));
        // Both spellings: transformers takes the old one.
        let both = r#", "rope_parameters": {"rope_theta": 5e5}, "rope_scaling": {"rope_type": "yarn"}"#;
        assert!(message(both).contains("yarn"));
        assert!(message(r#", "rope_scaling": "dynamic""#).contains("must be an object"));
        assert!(message(r#", "rope_parameters": {"rope_theta": "many"}"#).contains("rope_theta"));
        assert!(message(r#", "head_dim": 0"#).contains("head_dim"));
        assert!(ModelConfig::parse("[]").is_err());
        assert!(ModelConfig::parse("{").is_err());
        let other = r#"{"architectures": ["BertModel"]}"#;
        assert!(ModelConfig::parse(other).unwrap_err().message.contains("BertModel"));
    }
}
