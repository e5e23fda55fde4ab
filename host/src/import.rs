//! `host import`: a GGUF file becomes a Hugging Face folder that transformers, vLLM, PEFT and `host` itself load.
//!
//! Weights are dequantised to bf16 and written in shards with an index. The folder appears whole or not at all: it is
//! built under a temporary name beside its place, synced and renamed. Memory stays at a few tens of megabytes whatever
//! the model's size, because tensors pass through in pieces.

use std::fmt;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::{Map, Value as Json, json};

use crate::error::{Error, IoContext, Result};
use crate::gguf::{Gguf, LlamaShape, TensorTarget, Vocabulary, dequantise};

/// What was imported, as a person wants to read it.
#[derive(Clone, Debug)]
pub struct ImportReport {
    pub output_dir: PathBuf,
    pub num_tensors: usize,
    pub num_parameters: u64,
    pub num_tokens: usize,
    /// Encodings seen and how many tensors each.
    pub encodings: Vec<(&'static str, usize)>,
    pub bytes_read: u64,
    pub bytes_written: u64,
    /// Names of the files written, weights first.
    pub files: Vec<String>,
}

impl fmt::Display for ImportReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let encodings: Vec<_> = self.encodings.iter().map(|(name, count)| format!("{count} {name}")).collect();
        let megabytes = |bytes: u64| bytes as f64 / 1e6;
        writeln!(f, "tensors:     {} ({})", self.num_tensors, encodings.join(", "))?;
        writeln!(f, "parameters:  {:.1} million, as bf16", self.num_parameters as f64 / 1e6)?;
        writeln!(f, "vocabulary:  {} tokens", self.num_tokens)?;
        writeln!(f, "size:        {:.0} MB -> {:.0} MB", megabytes(self.bytes_read), megabytes(self.bytes_written))?;
        write!(f, "written to:  {} ({})", self.output_dir.display(), self.files.join(", "))
    }
}

/// A model is written in two shards at least, so that a folder always has an index, and in as many as keep each near
/// this size.
const SHARD_BYTES: u64 = 4_000_000_000;

/// Most bytes of bf16 that are in memory at once (one row, or one head's rows, where that is more).
const PIECE_BYTES: usize = 16 << 20;

/// Writes `input` as the folder `output_dir`, which must not exist, be empty, or be a model folder that `force` may
/// replace.
pub fn import_gguf(input: &Path, output_dir: &Path, force: bool) -> Result<ImportReport> {
    check_output_dir(input, output_dir, force)?;
    let gguf = Gguf::open(input)?;
    let shape = LlamaShape::read(&gguf)?;
    let targets = shape.targets(&gguf)?;
    let vocabulary = Vocabulary::read(&gguf)?;
    if vocabulary.len() > shape.vocab_size {
        let (tokens, rows) = (vocabulary.len(), shape.vocab_size);
        return Err(Error::config(format!("`{}` has {tokens} tokens but {rows} rows of embeddings", input.display())));
    }
    let tokenizer_json = serde_json::to_vec(&vocabulary.tokenizer_json()).map_err(not_json)?;
    tokenizers::Tokenizer::from_bytes(&tokenizer_json).map_err(|error| {
        Error::config(format!("the vocabulary of `{}` makes no tokenizer", input.display())).cause(error)
    })?;

    let parent = match output_dir.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    let unwritable = |error: std::io::Error| {
        let what = format!("the output folder `{}` cannot be written to", output_dir.display());
        // The library adds a random name to the system's words.
        let error = error.to_string();
        let cause = error.split(" at path ").next().unwrap_or_default();
        Error::config(what).cause(format!("`{}`: {cause}", parent.display())).hint("give another with `--output-dir`")
    };
    fs::create_dir_all(parent).map_err(unwritable)?;
    let building = tempfile::Builder::new()
        .prefix(".import-")
        // The folder keeps these after the rename; the umask applies.
        .permissions(fs::Permissions::from_mode(0o777))
        .tempdir_in(parent)
        .map_err(unwritable)?;
    let mut folder = Folder { dir: building.path(), files: vec![], bytes: 0 };
    folder.write_weights(&gguf, &targets)?;
    folder.write("tokenizer.json", &tokenizer_json)?;
    folder.write_json("tokenizer_config.json", &vocabulary.tokenizer_config(shape.max_position_embeddings))?;
    folder.write_json("special_tokens_map.json", &vocabulary.special_tokens_map())?;
    folder.write_json("generation_config.json", &generation_config(&vocabulary))?;
    folder.write_json("config.json", &config(&shape, &vocabulary))?;

    let report = ImportReport {
        output_dir: output_dir.to_owned(),
        num_tensors: targets.len(),
        num_parameters: targets.iter().map(|target| target.source.elements()).sum(),
        num_tokens: vocabulary.len(),
        encodings: encodings(&targets),
        bytes_read: gguf.size(),
        bytes_written: folder.bytes,
        files: folder.files,
    };
    publish(building, output_dir, parent)?;
    Ok(report)
}

fn check_output_dir(input: &Path, output_dir: &Path, force: bool) -> Result<()> {
    let shown = output_dir.display();
    let mut entries = match fs::read_dir(output_dir) {
        Ok(entries) => entries.peekable(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(Error::config(format!("cannot write to `{shown}`")).cause(error)),
    };
    if entries.peek().is_none() {
        return Ok(());
    }
    if !force {
        return Err(Error::config(format!("`{shown}` is not empty"))
            .hint("choose another folder, or replace the model in it with `--force`"));
    }
    if let (Ok(input), Ok(output)) = (input.canonicalize(), output_dir.canonicalize())
        && input.starts_with(&output)
    {
        return Err(Error::config(format!("`{shown}` holds the file to import and cannot be replaced")));
    }
    // `--force` with a slip of the hand must not delete somebody's work.
    let is_model = output_dir.join("config.json").is_file();
    if !is_model || entries.any(|entry| entry.is_ok_and(|entry| entry.path().is_dir())) {
        return Err(Error::config(format!("`{shown}` is not a model folder, so `--force` does not replace it"))
            .cause("a model folder has a `config.json` and no folders in it")
            .hint("delete it yourself, or choose another folder"));
    }
    Ok(())
}

/// Puts the finished folder in its place. What was there before is out of the way first and deleted last.
fn publish(building: tempfile::TempDir, output_dir: &Path, parent: &Path) -> Result<()> {
    let sync = |dir: &Path| File::open(dir).and_then(|dir| dir.sync_all()).path_context("sync", dir);
    sync(building.path())?;
    let replaced = if output_dir.exists() {
        let aside = tempfile::Builder::new()
            .prefix(".replaced-")
            .tempdir_in(parent)
            .path_context("create a folder in", parent)?;
        fs::rename(output_dir, aside.path().join("model")).path_context("replace", output_dir)?;
        Some(aside)
    } else {
        None
    };
    if let Err(error) = fs::rename(building.path(), output_dir) {
        if let Some(aside) = &replaced {
            fs::rename(aside.path().join("model"), output_dir).path_context("put back", output_dir)?;
        }
        return Err(error).path_context("write", output_dir);
    }
    // The folder has another name now; there is nothing left to remove.
    let _ = building.keep();
    sync(parent)
}

/// The folder being written.
struct Folder<'a> {
    dir: &'a Path,
    files: Vec<String>,
    bytes: u64,
}

impl Folder<'_> {
    fn write_json(&mut self, name: &str, json: &Json) -> Result<()> {
        let mut text = serde_json::to_vec_pretty(json).map_err(not_json)?;
        text.push(b'\n');
        self.write(name, &text)
    }

    fn write(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let path = self.dir.join(name);
        let mut file = File::create(&path).path_context("create", &path)?;
        file.write_all(bytes).and_then(|()| file.sync_all()).path_context("write", &path)?;
        self.files.push(name.to_owned());
        self.bytes += bytes.len() as u64;
        Ok(())
    }

    fn write_weights(&mut self, gguf: &Gguf, targets: &[TensorTarget]) -> Result<()> {
        let total: u64 = targets.iter().map(bf16_bytes).sum();
        let shards = split_shards(targets, total);
        let progress = Progress::new(total);
        let mut weight_map = vec![];
        for (index, shard) in shards.iter().enumerate() {
            let name = format!("model-{:05}-of-{:05}.safetensors", index + 1, shards.len());
            self.write_shard(gguf, &name, shard, &progress)?;
            weight_map.extend(shard.iter().map(|target| (target.name.clone(), Json::from(name.as_str()))));
        }
        weight_map.sort_by(|a, b| a.0.cmp(&b.0));
        let weight_map: Map<String, Json> = weight_map.into_iter().collect();
        let index = json!({"metadata": {"total_size": total}, "weight_map": weight_map});
        self.write_json("model.safetensors.index.json", &index)
    }

    fn write_shard(&mut self, gguf: &Gguf, name: &str, shard: &[TensorTarget], progress: &Progress) -> Result<()> {
        let mut header = Map::new();
        header.insert("__metadata__".into(), json!({"format": "pt"}));
        let mut end = 0;
        for target in shard {
            let start = end;
            end += bf16_bytes(target);
            let tensor = json!({"dtype": "BF16", "shape": target.source.shape, "data_offsets": [start, end]});
            header.insert(target.name.clone(), tensor);
        }
        let mut header = serde_json::to_vec(&header).map_err(not_json)?;
        // The data begins at a multiple of eight, as the format asks; JSON takes the spaces.
        header.resize(header.len().next_multiple_of(8), b' ');

        let path = self.dir.join(name);
        let mut file = BufWriter::new(File::create(&path).path_context("create", &path)?);
        let mut write = |bytes: &[u8]| file.write_all(bytes).path_context("write", &path);
        write(&(header.len() as u64).to_le_bytes())?;
        write(&header)?;
        for target in shard {
            write_tensor(gguf, target, &mut write, progress)?;
        }
        let file = file.into_inner().map_err(|error| error.into_error()).path_context("write", &path)?;
        file.sync_all().path_context("write", &path)?;
        self.files.push(name.to_owned());
        self.bytes += 8 + header.len() as u64 + end;
        Ok(())
    }
}

/// Reads, decodes and writes one tensor in pieces of whole rows (of whole heads, where rows change places).
fn write_tensor(
    gguf: &Gguf,
    target: &TensorTarget,
    write: &mut impl FnMut(&[u8]) -> Result<()>,
    progress: &Progress,
) -> Result<()> {
    let source = target.source;
    let num_rows: usize = source.shape[..source.shape.len() - 1].iter().product();
    let row_bytes = (bf16_bytes(target) as usize) / num_rows;
    let raw_row_bytes = source.bytes as usize / num_rows;
    let unit = target.interleaved_rows.unwrap_or(1);
    let piece_rows = (PIECE_BYTES / row_bytes / unit).max(1) * unit;
    let (mut raw, mut decoded, mut ordered) = (vec![], vec![], vec![]);
    for first in (0..num_rows).step_by(piece_rows) {
        let rows = piece_rows.min(num_rows - first);
        raw.resize(rows * raw_row_bytes, 0);
        gguf.read_at(source.offset + (first * raw_row_bytes) as u64, &mut raw)?;
        dequantise(source.tensor_type, &raw, &mut decoded);
        match target.interleaved_rows {
            None => write(&decoded)?,
            Some(rows_per_head) => {
                deinterleave(&decoded, row_bytes, rows_per_head, &mut ordered);
                write(&ordered)?;
            }
        }
        progress.advance((rows * row_bytes) as u64);
    }
    Ok(())
}

/// Row 2i of a head becomes row i, row 2i + 1 becomes row i + half.
fn deinterleave(from: &[u8], row_bytes: usize, rows_per_head: usize, into: &mut Vec<u8>) {
    into.clear();
    for head in from.chunks_exact(rows_per_head * row_bytes) {
        for parity in [0, 1] {
            head.chunks_exact(row_bytes).skip(parity).step_by(2).for_each(|row| into.extend_from_slice(row));
        }
    }
}

/// Consecutive shares of about the same size.
fn split_shards<'a, 'b>(targets: &'a [TensorTarget<'b>], total: u64) -> Vec<&'a [TensorTarget<'b>]> {
    let num_shards = total.div_ceil(SHARD_BYTES).max(2);
    let mut start = 0;
    let shard_of = |target: &TensorTarget| {
        // By its middle, so that a large last tensor still makes a second shard.
        let middle = start + bf16_bytes(target) / 2;
        start += bf16_bytes(target);
        (u128::from(middle) * u128::from(num_shards) / u128::from(total.max(1))) as u64
    };
    let shard_of: Vec<u64> = targets.iter().map(shard_of).collect();
    let mut shards = vec![];
    let mut rest = targets;
    for run in shard_of.chunk_by(|a, b| a == b) {
        let (shard, after) = rest.split_at(run.len());
        shards.push(shard);
        rest = after;
    }
    shards
}

fn bf16_bytes(target: &TensorTarget) -> u64 {
    target.source.elements() * 2
}

fn encodings(targets: &[TensorTarget]) -> Vec<(&'static str, usize)> {
    let mut types: Vec<_> = targets.iter().map(|target| target.source.tensor_type).collect();
    types.sort();
    let mut counts: Vec<_> = types.chunk_by(|a, b| a == b).map(|run| (run[0].name(), run.len())).collect();
    counts.sort_by_key(|&(_, count)| std::cmp::Reverse(count));
    counts
}

/// `config.json` with the keys that transformers writes for a Llama (in the spelling of its 4.x releases, which every
/// later one and vLLM read).
fn config(shape: &LlamaShape, vocabulary: &Vocabulary) -> Json {
    json!({
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": false,
        "attention_dropout": 0.0,
        "bos_token_id": vocabulary.bos,
        "eos_token_id": vocabulary.eos,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": shape.intermediate_size,
        "max_position_embeddings": shape.max_position_embeddings,
        "mlp_bias": false,
        "model_type": "llama",
        "num_attention_heads": shape.num_heads,
        "num_hidden_layers": shape.num_layers,
        "num_key_value_heads": shape.num_kv_heads,
        "pad_token_id": vocabulary.pad,
        "pretraining_tp": 1,
        "rms_norm_eps": shape.rms_norm_eps,
        "rope_scaling": shape.rope_scaling,
        "rope_theta": shape.rope_theta,
        "tie_word_embeddings": shape.tie_word_embeddings,
        "torch_dtype": "bfloat16",
        "transformers_version": TRANSFORMERS_VERSION,
        "use_cache": true,
        "vocab_size": shape.vocab_size,
    })
}

fn generation_config(vocabulary: &Vocabulary) -> Json {
    let mut config = json!({"_from_model_config": true});
    for (key, id) in
        [("bos_token_id", vocabulary.bos), ("eos_token_id", vocabulary.eos), ("pad_token_id", vocabulary.pad)]
    {
        if let Some(id) = id {
            config[key] = id.into();
        }
    }
    config["transformers_version"] = TRANSFORMERS_VERSION.into();
    config
}

/// Maps of strings and numbers always serialise.
fn not_json(error: serde_json::Error) -> Error {
    Error::bug("cannot serialise JSON").cause(error)
}

/// The release whose spelling of `config.json` is written.
const TRANSFORMERS_VERSION: &str = "4.46.0";

/// A bar on the terminal from the third second on; shorter imports need none.
struct Progress {
    bar: ProgressBar,
    started: Instant,
}

impl Progress {
    fn new(total: u64) -> Self {
        let style = ProgressStyle::with_template("importing {bar:40} {bytes}/{total_bytes} [{elapsed}<{eta}]")
            .unwrap_or_else(|_| ProgressStyle::default_bar());
        let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::hidden()).with_style(style);
        Self { bar, started: Instant::now() }
    }

    fn advance(&self, bytes: u64) {
        if self.bar.is_hidden() && self.started.elapsed() > Duration::from_secs(2) {
            self.bar.set_draw_target(ProgressDrawTarget::stderr());
        }
        self.bar.inc(bytes);
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;
    use proptest::prelude::*;
    use safetensors::SafeTensors;

    use super::*;
    use crate::gguf::fixture::{GgufFile, HIDDEN, Meta, tiny_llama};

    struct Imported {
        result: Result<ImportReport>,
        folder: tempfile::TempDir,
    }

    impl Imported {
        fn dir(&self) -> PathBuf {
            self.folder.path().join("model")
        }

        fn json(&self, name: &str) -> Json {
            serde_json::from_slice(&fs::read(self.dir().join(name)).unwrap()).unwrap()
        }

        /// First value of each row of a tensor, found through the index.
        fn rows(&self, name: &str) -> Vec<f32> {
            let file = self.json("model.safetensors.index.json")["weight_map"][name].as_str().unwrap().to_owned();
            let bytes = fs::read(self.dir().join(file)).unwrap();
            let tensors = SafeTensors::deserialize(&bytes).unwrap();
            let tensor = tensors.tensor(name).unwrap();
            let row_bytes = tensor.shape().last().unwrap() * 2;
            tensor.data().chunks(row_bytes).map(|row| bf16::from_le_bytes([row[0], row[1]]).to_f32()).collect()
        }
    }

    fn import(bytes: &[u8]) -> Imported {
        let folder = tempfile::tempdir().unwrap();
        let input = folder.path().join("tiny.gguf");
        fs::write(&input, bytes).unwrap();
        Imported { result: import_gguf(&input, &folder.path().join("model"), false), folder }
    }

    /// The error of a file changed by `change`; nothing may be left beside it.
    fn refused(change: impl FnOnce(&mut GgufFile)) -> String {
        let mut file = tiny_llama();
        change(&mut file);
        let imported = import(&file.bytes());
        let error = imported.result.as_ref().unwrap_err().to_string();
        assert_eq!(fs::read_dir(imported.folder.path()).unwrap().count(), 1, "{error}");
        error.replace(&imported.folder.path().display().to_string(), "")
    }

    #[test]
    fn a_model_becomes_a_folder() {
        let imported = import(&tiny_llama().bytes());
        let report = imported.result.as_ref().unwrap();
        assert_eq!(report.num_tensors, 20);
        assert_eq!(report.files[..2], ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]);
        let names = |dir: &Path| fs::read_dir(dir).unwrap().count();
        assert_eq!(names(&imported.dir()), report.files.len());

        let config = imported.json("config.json");
        assert_eq!(config["rms_norm_eps"], 1e-5);
        assert_eq!(config["tie_word_embeddings"], true);
        assert_eq!(config["eos_token_id"], 2);
        assert_eq!(imported.json("tokenizer_config.json")["chat_template"], "{{ messages[0].content }}");
        assert_eq!(imported.json("special_tokens_map.json")["bos_token"], "<|im_start|>");
    }

    #[test]
    fn rows_of_q_and_k_are_put_back_in_halves() {
        let imported = import(&tiny_llama().bytes());
        imported.result.as_ref().unwrap();
        let halves = |rows: std::ops::Range<usize>| {
            let (even, odd) = (rows.clone().step_by(2), rows.skip(1).step_by(2));
            even.chain(odd).map(|row| row as f32 / 2.0).collect::<Vec<_>>()
        };
        assert_eq!(imported.rows("model.layers.1.self_attn.q_proj.weight"), [halves(0..32), halves(32..64)].concat());
        assert_eq!(imported.rows("model.layers.0.self_attn.k_proj.weight"), halves(0..32));
        let in_order: Vec<f32> = (0..HIDDEN).map(|row| row as f32 / 2.0).collect();
        assert_eq!(imported.rows("model.layers.0.self_attn.o_proj.weight"), in_order);
    }

    #[test]
    fn the_tokenizer_merges_and_keeps_special_tokens_whole() {
        let imported = import(&tiny_llama().bytes());
        imported.result.as_ref().unwrap();
        let tokenizer = tokenizers::Tokenizer::from_file(imported.dir().join("tokenizer.json")).unwrap();
        let encoding = tokenizer.encode("<|im_start|>hello shell\n", false).unwrap();
        assert_eq!(encoding.get_tokens(), ["<|im_start|>", "hell", "o", "Ġ", "s", "hell", "Ċ"]);
        assert_eq!(tokenizer.decode(encoding.get_ids(), true).unwrap(), "hello shell\n");
    }

    #[test]
    fn bos_is_added_where_the_file_says_so() {
        let mut file = tiny_llama();
        file.set("tokenizer.ggml.add_bos_token", Meta::Bool(true));
        let imported = import(&file.bytes());
        imported.result.as_ref().unwrap();
        let tokenizer = tokenizers::Tokenizer::from_file(imported.dir().join("tokenizer.json")).unwrap();
        assert_eq!(tokenizer.encode("o", true).unwrap().get_tokens(), ["<|im_start|>", "o"]);
        assert_eq!(tokenizer.encode("o", false).unwrap().get_tokens(), ["o"]);
    }

    #[test]
    fn llama_3_rope_factors_become_rope_scaling() {
        let mut file = tiny_llama();
        file.set("llama.rope.freq_base", Meta::F32(500_000.0));
        let divisors = (0..16).map(|i| {
            let wavelength = std::f64::consts::TAU * 500_000f64.powf(f64::from(i) / 16.0);
            let smooth = (8192.0 / wavelength - 1.0) / 3.0;
            (1.0 / ((1.0 - smooth.clamp(0.0, 1.0)) / 8.0 + smooth.clamp(0.0, 1.0))) as f32
        });
        let mut freqs = file.tensors.last().unwrap().clone();
        (freqs.name, freqs.shape, freqs.values) = ("rope_freqs.weight".into(), vec![16], divisors.collect());
        file.tensors.push(freqs);
        let imported = import(&file.bytes());
        imported.result.as_ref().unwrap();
        let scaling = &imported.json("config.json")["rope_scaling"];
        assert_eq!((scaling["rope_type"].as_str(), scaling["factor"].as_f64()), (Some("llama3"), Some(8.0)));

        file.tensors.last_mut().unwrap().values[9] += 0.5;
        let imported = import(&file.bytes());
        assert!(imported.result.unwrap_err().to_string().contains("scales RoPE in a way that is not Llama 3's"));
    }

    #[test]
    fn what_is_not_read_is_named() {
        for (change, expected) in [
            (Box::new(|f: &mut GgufFile| f.version = 1) as Box<dyn FnOnce(&mut GgufFile)>, "is GGUF version 1"),
            (Box::new(|f| f.version = 3u32.swap_bytes()), "is a big-endian GGUF"),
            (Box::new(|f| f.set("general.architecture", Meta::Str("qwen2".into()))), "architecture `qwen2`"),
            (Box::new(|f| f.set("llama.expert_count", Meta::U32(8))), "mixture of experts"),
            (Box::new(|f| f.tensors[1].type_id = 12), "`blk.0.attn_q.weight` of `/tiny.gguf` is quantised as Q4_K"),
            (Box::new(|f| f.tensors[1].type_id = 77), "quantised as type 77"),
            (Box::new(|f| f.set("tokenizer.ggml.model", Meta::Str("llama".into()))), "SentencePiece"),
            (Box::new(|f| f.set("tokenizer.ggml.pre", Meta::Str("tekken".into()))), "by `tekken`"),
            (Box::new(|f| f.set("llama.block_count", Meta::U32(u32::MAX))), "is 4294967295; it must be 1 to"),
            (Box::new(|f| f.set("llama.block_count", Meta::U32(3))), "has no tensor `blk.2.attn_q.weight`"),
            (Box::new(|f| f.set("llama.block_count", Meta::Bool(true))), "is a truth value, not a count"),
            (Box::new(|f| f.set("llama.attention.head_count", Meta::U32(0))), "is 0; it must be 1 to"),
            (Box::new(|f| f.set("llama.attention.head_count", Meta::U32(3))), "do not go together"),
            (Box::new(|f| f.set("llama.embedding_length", Meta::U32(32))), "does not fit its metadata"),
            (Box::new(|f| f.set("tokenizer.ggml.eos_token_id", Meta::U32(9999))), "is 9999, the vocabulary has"),
            (Box::new(|f| f.set("tokenizer.ggml.merges", Meta::Strs(vec!["a".into()]))), "the merge `a`"),
            (Box::new(|f| f.set("tokenizer.ggml.merges", Meta::Strs(vec!["a b".into()]))), "that are no tokens"),
            (Box::new(|f| f.tensors[1].name = "blk.0.attn_q.bias".into()), "has no tensor `blk.0.attn_q.weight`"),
            (Box::new(|f| f.tensors.push(f.tensors[1].clone())), "tensor `blk.0.attn_q.weight` appears twice"),
        ] {
            let error = refused(change);
            assert!(error.contains(expected), "expected `{expected}` in:\n{error}");
        }
    }

    #[test]
    fn counts_beyond_the_file_allocate_nothing() {
        let whole = tiny_llama().bytes();
        for at in [8, 16] {
            let mut bytes = whole.clone();
            bytes[at..at + 8].copy_from_slice(&(u64::MAX / 2).to_le_bytes());
            let error = import(&bytes).result.unwrap_err().to_string();
            assert!(error.contains("is damaged or cut short"), "{error}");
        }
        let error = import(b"%PDF-1.7 is what this file is").result.unwrap_err().to_string();
        assert!(error.contains("is not a GGUF file: it starts with `%PDF`"), "{error}");
        assert!(import(b"GGUF").result.unwrap_err().to_string().contains("it has 4 bytes"));
    }

    #[test]
    fn force_replaces_a_model_folder_and_nothing_else() {
        let imported = import(&tiny_llama().bytes());
        let (input, dir) = (imported.folder.path().join("tiny.gguf"), imported.dir());
        let again = |force| import_gguf(&input, &dir, force).map_err(|error| error.to_string());
        assert!(again(false).unwrap_err().contains("is not empty"));
        fs::write(dir.join("stray.bin"), "old").unwrap();
        again(true).unwrap();
        assert!(!dir.join("stray.bin").exists());
        assert_eq!(fs::read_dir(imported.folder.path()).unwrap().count(), 2);

        fs::create_dir(dir.join("thesis")).unwrap();
        assert!(again(true).unwrap_err().contains("is not a model folder"));
        let error = import_gguf(&input, imported.folder.path(), true).unwrap_err().to_string();
        assert!(error.contains("holds the file to import"), "{error}");
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn a_damaged_file_is_an_error_or_a_model(
            cut in prop::option::of(any::<prop::sample::Index>()),
            flips in prop::collection::vec((any::<prop::sample::Index>(), 0u8..8), 0..6),
            // Most of the file is weights, where any bits will do; the header is where a reader can go wrong.
            header_flips in prop::collection::vec((0usize..12_000, 0u8..8), 0..6),
        ) {
            let mut bytes = tiny_llama().bytes();
            for (index, bit) in flips {
                let at = index.index(bytes.len());
                bytes[at] ^= 1 << bit;
            }
            for (at, bit) in header_flips {
                bytes[at] ^= 1 << bit;
            }
            if let Some(cut) = cut {
                bytes.truncate(cut.index(bytes.len()));
            }
            let imported = import(&bytes);
            prop_assert_eq!(imported.dir().exists(), imported.result.is_ok());
        }
    }
}
