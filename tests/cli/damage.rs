//! Files that are damaged, for 15 seconds a kind: an error or a value, never a panic, a hang or more memory than the files
//! could need.
//!
//! Each kind has a process of its own, whose address space is limited: an allocation of a size that the damage made up ends
//! it, as does a stack that overflows. `HOST_DAMAGE_SEED` repeats a file, whose number is printed when it fails;
//! `HOST_DAMAGE_SECONDS` goes on for longer.

use std::io::{Cursor, Read, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use host::config::Config;
use host::config::plan::{DataFormat, RowsPlan, TokenizerPlan};
use host::config::resolve::{self, FileKind, Surroundings};
use host::data::source::{Rows, SourceFile, Wanted};
use host::error::Kind;
use host::hf::WeightIndex;
use host::hf::torch_file;
use host::tokenizer::Tokenizer;
use rustix::process::{Resource, Rlimit, setrlimit};

/// One file. Far above what any takes, far below a hang.
const ONE: Duration = Duration::from_secs(10);
const ADDRESS_SPACE: u64 = 3 << 30;

fn fixtures(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures").join(name)
}

/// How long a kind is tried.
fn lasts() -> Duration {
    let seconds = std::env::var("HOST_DAMAGE_SECONDS").ok().and_then(|seconds| seconds.parse().ok());
    Duration::from_secs(seconds.unwrap_or(15))
}

/// splitmix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound.max(1) as u64) as usize
    }

    /// One to six changes: a byte, a run, a piece doubled or moved, a number made extreme, a nest made deep.
    fn damage(&mut self, bytes: &mut Vec<u8>, words: &[&str]) {
        for _ in 0..=self.below(6) {
            let at = self.below(bytes.len() + 1);
            match self.below(9) {
                0 => bytes.insert(at, self.next() as u8),
                1 => bytes.truncate(at),
                2 if at < bytes.len() => bytes[at] ^= 1 << self.below(8),
                3 if at < bytes.len() => bytes[at] = [0, 1, 0x7f, 0x80, 0xff][self.below(5)],
                4 => {
                    let end = (at + self.below(12)).min(bytes.len());
                    bytes.drain(at..end);
                }
                5 => {
                    let end = (at + 1 + self.below(40)).min(bytes.len());
                    let piece = bytes[at..end].to_vec();
                    let to = self.below(bytes.len() + 1);
                    bytes.splice(to..to, piece);
                }
                6 => {
                    let word = words[self.below(words.len())].as_bytes();
                    let end = if self.below(2) == 0 { at } else { (at + word.len()).min(bytes.len()) };
                    bytes.splice(at..end, word.iter().copied());
                }
                7 => {
                    let numbers = ["-1", "0", "9223372036854775807", "18446744073709551615", "1e308", "4294967296"];
                    let digits = bytes.iter().enumerate().filter(|(_, byte)| byte.is_ascii_digit()).map(|(at, _)| at);
                    let places: Vec<usize> = digits.collect();
                    if let Some(&at) = places.get(self.below(places.len())) {
                        let end = at + bytes[at..].iter().take_while(|byte| byte.is_ascii_digit()).count();
                        bytes.splice(at..end, numbers[self.below(numbers.len())].bytes());
                    }
                }
                _ => {
                    let deep = ["[", "{\"a\":", "(", "- ", "\u{5d}"][self.below(5)].repeat(1 << self.below(18));
                    if self.below(8) == 0 {
                        bytes.splice(at..at, deep.into_bytes());
                    }
                }
            }
        }
    }
}

/// What a kind of file is tried with: whole files, words of its language, and what reads it.
struct Trial {
    whole: Vec<Vec<u8>>,
    words: &'static [&'static str],
    read: Box<dyn Fn(usize, Vec<u8>)>,
}

fn config() -> Trial {
    let configs = [
        "../configs/smollm2/135M_lora_summarize.yaml",
        "../configs/generation.yaml",
        "fixtures/seed/my_llama3_1_custom_config.yaml",
    ];
    let whole =
        configs.map(|name| std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests").join(name)).unwrap());
    let around = || Surroundings {
        seed: 1,
        cwd: "/home/me".into(),
        shipped: vec![],
        cache_dir: None,
        kind: &|_| Some(FileKind::File),
        files_below: &|_| vec!["train.jsonl".to_owned()],
        metadata: &|_| Ok(Default::default()),
    };
    let read = move |_: usize, bytes: Vec<u8>| {
        let text = String::from_utf8_lossy(&bytes);
        let Ok(config) = Config::parse(&text, Path::new("c.yaml"), &[]) else { return };
        let train = resolve::train(&config, Path::new("r.wasm"), &around()).map(drop);
        let generate = resolve::generate(&config, &around()).map(drop);
        for error in [train, generate].into_iter().filter_map(Result::err) {
            assert_eq!(error.kind, Kind::Config, "{error}");
        }
        let _ = config.print(true, true);
    };
    let words = &[
        "${a}",
        "${${",
        "&x ",
        "*x",
        "<<: ",
        "!!int ",
        "? ",
        "---\n",
        "...\n",
        "\"",
        "'",
        "|\n",
        ">-\n",
        "\t",
        "_component_: ",
    ];
    Trial { whole: whole.into(), words, read: Box::new(read) }
}

fn safetensors() -> Trial {
    let model = std::fs::read(fixtures("families/qwen2/model.safetensors")).unwrap();
    let length = u64::from_le_bytes(model[..8].try_into().unwrap()) as usize;
    let (header, data) = (model[8..8 + length].to_vec(), model[8 + length..].to_vec());
    let folder = tempfile::tempdir().unwrap();
    let read = move |turn: usize, header: Vec<u8>| {
        // Most with a length that fits, so that what is inside is looked at.
        let length = if turn.is_multiple_of(8) {
            (turn as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15)
        } else {
            header.len() as u64
        };
        let file = [&length.to_le_bytes()[..], &header, &data].concat();
        std::fs::write(folder.path().join("model.safetensors"), file).unwrap();
        if let Ok(index) = WeightIndex::open(folder.path(), &[]) {
            let ends = index.tensors.values().map(|entry| entry.end).max().unwrap_or(0);
            assert!(ends <= 8 + header.len() + data.len(), "a tensor lies outside of the file");
        }
    };
    let words =
        &["\"dtype\":\"F32\"", "\"data_offsets\":[0,4]", "\"shape\":[", "__metadata__", "null", "\\u0000", "}", "["];
    Trial { whole: vec![header], words, read: Box::new(read) }
}

/// The file again with another index, its checksums made anew.
fn with_index(file: &[u8], index: Option<&[u8]>) -> (Vec<u8>, Vec<u8>) {
    let mut archive = zip::ZipArchive::new(Cursor::new(file)).unwrap();
    let mut out = zip::ZipWriter::new(Cursor::new(vec![]));
    let stored = zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
    let mut found = vec![];
    for entry in 0..archive.len() {
        let mut entry = archive.by_index(entry).unwrap();
        let name = entry.name().unwrap().into_owned();
        let mut bytes = vec![];
        entry.read_to_end(&mut bytes).unwrap();
        if name.ends_with("data.pkl") {
            found.clone_from(&bytes);
            bytes = index.map_or(bytes, <[u8]>::to_vec);
        }
        out.start_file(name, stored).unwrap();
        out.write_all(&bytes).unwrap();
    }
    (out.finish().unwrap().into_inner(), found)
}

fn pickle() -> Trial {
    let files = ["families/meta/consolidated.00.pth", "families/torchtune_adapter/adapter_model.pt"];
    let files = files.map(|name| std::fs::read(fixtures(name)).unwrap());
    let whole: Vec<_> = files.iter().map(|file| with_index(file, None).1).collect();
    let folder = tempfile::tempdir().unwrap();
    let read = move |turn: usize, index: Vec<u8>| {
        let path = folder.path().join("model.pt");
        std::fs::write(&path, with_index(&files[turn % files.len()], Some(&index)).0).unwrap();
        let size = std::fs::metadata(&path).unwrap().len() as usize;
        if let Ok(tensors) = torch_file::tensors(&path) {
            assert!(tensors.iter().all(|tensor| tensor.end <= size), "a tensor lies outside of the file");
        }
    };
    let words = &[
        "cos\nsystem\n",
        "\u{85}R",
        "cbuiltins\neval\n",
        "}",
        "(",
        "t",
        "R.",
        "\u{80}\u{4}",
        "q\u{0}",
        "h\u{0}",
        "2",
        "2222",
        "ctorch\nFloatStorage\n",
    ];
    Trial { whole, words, read: Box::new(read) }
}

fn tokenizers() -> Trial {
    let names =
        ["tokenizers/llama3.model", "tokenizers/llama2.model", "tiny-llama/tokenizer.json", "tokenizers/vocab.json"];
    let whole: Vec<_> = names.map(|name| std::fs::read(fixtures(name)).unwrap()).into();
    let folder = tempfile::tempdir().unwrap();
    let special = fixtures("tokenizers/llama3_special_tokens.json");
    let read = move |turn: usize, bytes: Vec<u8>| {
        let which = turn % names.len();
        let path = folder.path().join(Path::new(names[which]).file_name().unwrap());
        std::fs::write(&path, bytes).unwrap();
        let mut plan = TokenizerPlan::plain(path);
        if which == 0 {
            plan.special_tokens_path = Some(special.clone());
        }
        plan.merges_file = (which == 3).then(|| fixtures("tokenizers/merges.txt"));
        if let Ok(tokenizer) = Tokenizer::of(&plan)
            && let Ok(ids) = tokenizer.encode("A kettle, 12 kettles;\n\tété \u{1f600} <|eot_id|> x")
        {
            let _ = tokenizer.decode(&ids);
        }
    };
    let words = &[
        "\"type\": \"BPE\"",
        "\"ByteLevel\"",
        "\"pattern\": {\"Regex\": \"(a*)*b\"}",
        "null",
        "\"id\": -1",
        "AAA= 0\n",
        "\"content\": \"\"",
        "\"merges\": [",
    ];
    Trial { whole, words, read: Box::new(read) }
}

fn parquet() -> Trial {
    use std::sync::Arc;

    use arrow::array::{ArrayRef, Int64Array, RecordBatch, StringArray};

    let texts = |of: &dyn Fn(usize) -> String| -> ArrayRef { Arc::new(StringArray::from_iter_values((0..50).map(of))) };
    let batch = RecordBatch::try_from_iter([
        ("a", texts(&|i| format!("text {i}"))),
        ("b", texts(&|i| "word ".repeat(i % 7))),
        ("n", Arc::new(Int64Array::from_iter_values(0..50)) as ArrayRef),
    ])
    .unwrap();
    let mut file = vec![];
    let mut writer = ::parquet::arrow::ArrowWriter::try_new(&mut file, batch.schema(), None).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
    // The footer: its thrift, its length and the magic number.
    let length = u32::from_le_bytes(file[file.len() - 8..file.len() - 4].try_into().unwrap()) as usize;
    let pages = file[..file.len() - 8 - length].to_vec();
    let footer = file[pages.len()..pages.len() + length].to_vec();
    let folder = tempfile::tempdir().unwrap();
    let read = move |turn: usize, footer: Vec<u8>| {
        let length = if turn.is_multiple_of(8) { turn as u32 * 0x9e37 } else { footer.len() as u32 };
        let mut bytes = [&pages[..], &footer, &length.to_le_bytes(), b"PAR1"].concat();
        if turn.is_multiple_of(5) {
            // A page as well.
            let at = turn * 31 % pages.len();
            bytes[at] ^= 1 << (turn % 8);
        }
        let path = folder.path().join("rows.parquet");
        std::fs::write(&path, bytes).unwrap();
        let Ok(source) = SourceFile::scan(&path, &DataFormat::Parquet) else { return };
        let _ = source.require(&Wanted::of(&RowsPlan::Text { column: "a".into(), add_eos: true }));
        let num_rows = source.num_rows;
        let mut rows =
            Rows::new(vec![(source, 0..num_rows)], Wanted::of(&RowsPlan::Text { column: "a".into(), add_eos: true }));
        // A footer may claim any number of rows: as many as are read are taken, up to a few batches.
        for _ in 0..4 {
            match rows.take(100) {
                Ok(rows) if rows.is_empty() => break,
                Ok(_) => {}
                Err(_) => break,
            }
        }
    };
    let words = &["\u{15}\u{0}", "\u{19}\u{1c}", "\u{ff}\u{ff}\u{ff}\u{ff}\u{7f}", "a", "schema"];
    Trial { whole: vec![footer], words, read: Box::new(read) }
}

fn trial(kind: &str) -> Trial {
    match kind {
        "config" => config(),
        "safetensors" => safetensors(),
        "pickle" => pickle(),
        "tokenizers" => tokenizers(),
        "parquet" => parquet(),
        other => panic!("no kind `{other}`"),
    }
}

#[test]
#[ignore = "started by the other tests"]
fn damaging_by_itself() {
    let Ok(kind) = std::env::var("HOST_DAMAGE") else { return };
    let limit = Rlimit { current: Some(ADDRESS_SPACE), maximum: Some(ADDRESS_SPACE) };
    setrlimit(Resource::As, limit).unwrap();
    let first = std::env::var("HOST_DAMAGE_SEED").ok().map(|seed| seed.parse().unwrap());
    let Trial { whole, words, read } = trial(&kind);
    let started = Instant::now();
    let mut turn = first.unwrap_or(0usize);
    while started.elapsed() < lasts() {
        let mut random = Random(turn as u64);
        // The undamaged ones first: they are read.
        let mut bytes = whole[turn % whole.len()].clone();
        if turn >= whole.len() {
            random.damage(&mut bytes, words);
        }
        let begun = Instant::now();
        // A process that is killed says nothing: this line does.
        if std::env::var_os("HOST_DAMAGE_SEED").is_some() {
            println!("{}", String::from_utf8_lossy(&bytes));
        }
        std::fs::write(std::env::var_os("HOST_DAMAGE_TURN").unwrap(), turn.to_string()).unwrap();
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| read(turn, bytes))) {
            println!("turn {turn} panicked");
            std::panic::resume_unwind(panic);
        }
        assert!(begun.elapsed() < ONE, "turn {turn} took {:?}", begun.elapsed());
        turn += 1;
        if first.is_some() {
            break;
        }
    }
    println!("{turn} files");
}

#[track_caller]
fn survives(kind: &str) {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path().join("turn");
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "damage::damaging_by_itself", "--ignored", "--nocapture", "--test-threads", "1"]);
    command.env("HOST_DAMAGE", kind).env("HOST_DAMAGE_TURN", &at).env("RUST_BACKTRACE", "0");
    // To files: a pipe that nobody reads yet would fill.
    let logs = ["out", "err"].map(|name| folder.path().join(name));
    let [out, err] = logs.each_ref().map(|path| Stdio::from(std::fs::File::create(path).unwrap()));
    let mut child = command.stdin(Stdio::null()).stdout(out).stderr(err).spawn().unwrap();
    let started = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if started.elapsed() > lasts() + 2 * ONE {
            child.kill().unwrap();
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    let status = child.wait().unwrap();
    let turn = std::fs::read_to_string(at).unwrap_or_default();
    let said = logs.map(|path| String::from_utf8_lossy(&std::fs::read(path).unwrap()).into_owned()).concat();
    let last: Vec<&str> = said.lines().rev().take(12).collect();
    let last = last.into_iter().rev().collect::<Vec<_>>().join("\n");
    assert!(status.success(), "{kind}: {status} at HOST_DAMAGE_SEED={turn}\n{last}");
    println!("{kind}: {}", said.lines().find(|line| line.ends_with(" files")).unwrap_or_default());
}

#[test]
fn damaged_configs() {
    survives("config");
}

#[test]
fn damaged_safetensors_headers() {
    survives("safetensors");
}

#[test]
fn damaged_pickled_indexes() {
    survives("pickle");
}

#[test]
fn damaged_tokenizers() {
    survives("tokenizers");
}

#[test]
fn damaged_parquet_footers() {
    survives("parquet");
}
