use serde_json::Value;

use super::*;

fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/tiny-llama")
}

/// The tiny tokenizer in a folder of its own, with `edit` applied to tokenizer.json and the given files beside it.
fn variant(edit: impl FnOnce(&mut Value), files: &[(&str, &str)]) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let mut json: Value = serde_json::from_slice(&std::fs::read(fixture().join("tokenizer.json")).unwrap()).unwrap();
    edit(&mut json);
    let path = folder.path().join("tokenizer.json");
    std::fs::write(&path, serde_json::to_vec(&json).unwrap()).unwrap();
    for (name, text) in files {
        std::fs::write(folder.path().join(name), text).unwrap();
    }
    (folder, path)
}

#[test]
fn reads_the_tiny_tokenizer() {
    let tokenizer = Tokenizer::open(&fixture().join("tokenizer.json")).unwrap();
    assert_eq!(tokenizer.bos(), Some(4088));
    assert_eq!((tokenizer.eos(), tokenizer.pad()), (4089, 4090));
    assert_eq!(tokenizer.stop_tokens(), [4089]);
    assert_eq!(tokenizer.vocab_size(), 4096);
    assert_eq!(tokenizer.encode("").unwrap(), [0u32; 0]);
}

#[test]
fn special_tokens_are_read_by_their_spelling_and_left_out_of_text() {
    let tokenizer = Tokenizer::open(&fixture().join("tokenizer.json")).unwrap();
    let ids = tokenizer.encode("a<|end_of_text|>b").unwrap();
    assert_eq!(ids, [64, 4089, 65]);
    assert_eq!(tokenizer.decode(&ids).unwrap(), "ab");
}

#[test]
fn whether_bos_is_added_follows_the_files() {
    let chat_ml = r#"{"bos_token": "<|start_header_id|>", "eos_token": {"content": "<|eot_id|>"}, "pad_token": null}"#;
    let no_processor = |json: &mut Value| json["post_processor"] = Value::Null;

    let (_folder, path) = variant(no_processor, &[("tokenizer_config.json", chat_ml)]);
    let tokenizer = Tokenizer::open(&path).unwrap();
    assert_eq!((tokenizer.bos(), tokenizer.eos(), tokenizer.pad()), (None, 4094, 4094));

    let says = chat_ml.replace('}', r#", "add_bos_token": true}"#).replacen(r#", "add_bos_token": true}"#, "}", 1);
    let (_folder, path) = variant(no_processor, &[("tokenizer_config.json", &says)]);
    assert_eq!(Tokenizer::open(&path).unwrap().bos(), Some(4091));

    let says = r#"{"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "add_bos_token": false}"#;
    let (_folder, path) = variant(|_| (), &[("tokenizer_config.json", says)]);
    assert_eq!(Tokenizer::open(&path).unwrap().bos(), None);
}

#[test]
fn falls_back_to_ids_and_takes_every_stop_token() {
    let (_folder, path) = variant(
        |_| (),
        &[
            ("generation_config.json", r#"{"eos_token_id": [4089, 4094, 999999]}"#),
            ("config.json", r#"{"bos_token_id": 4088, "eos_token_id": 4093}"#),
        ],
    );
    let tokenizer = Tokenizer::open(&path).unwrap();
    assert_eq!((tokenizer.bos(), tokenizer.eos()), (Some(4088), 4089));
    assert_eq!(tokenizer.stop_tokens(), [4089, 4093, 4094]);
}

#[test]
fn mistakes_are_named() {
    let (_folder, path) = variant(|_| (), &[]);
    let error = Tokenizer::open(&path).unwrap_err().to_string();
    assert!(error.contains("no end-of-sequence token is named beside"), "{error}");

    let (_folder, path) = variant(|_| (), &[("tokenizer_config.json", r#"{"eos_token": "</s>"}"#)]);
    let error = Tokenizer::open(&path).unwrap_err().to_string();
    assert!(error.contains("`eos_token` is `</s>`"), "{error}");

    let (_folder, path) = variant(|_| (), &[("tokenizer_config.json", "{\n  nonsense")]);
    let error = Tokenizer::open(&path).unwrap_err().to_string();
    assert!(error.contains("tokenizer_config.json:2:3"), "{error}");

    std::fs::write(&path, "{}").unwrap();
    let error = Tokenizer::open(&path).unwrap_err();
    assert_eq!(error.exit_code(), 2, "{error}");
}

#[test]
fn streaming_gives_the_same_text_in_whole_characters() {
    let tokenizer = Tokenizer::open(&fixture().join("tokenizer.json")).unwrap();
    let text = "naïve 日本語 🙂 done";
    let mut stream = tokenizer.stream();
    let mut shown = String::new();
    for id in tokenizer.encode(text).unwrap() {
        let piece = stream.push(id).unwrap().unwrap_or_default();
        assert!(!piece.contains('\u{fffd}'), "{piece:?}");
        shown += &piece;
    }
    shown += &stream.finish().unwrap();
    assert_eq!(shown, text);

    // Cut inside a character: nothing is shown for it until the end.
    let ids = tokenizer.encode("a🙂").unwrap();
    let mut stream = tokenizer.stream();
    let shown: String = ids[..ids.len() - 1].iter().filter_map(|&id| stream.push(id).unwrap()).collect();
    assert_eq!(shown, "a");
    assert!(stream.finish().unwrap().contains('\u{fffd}'));
}

fn tokenizers() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/tokenizers")
}

/// The tiny vocabularies of `tests/fixtures/tokenizers/generate.py`.
pub fn family(name: &str) -> TokenizerPlan {
    let at = |file: &str| tokenizers().join(file);
    match name {
        "llama3" => TokenizerPlan {
            special_tokens_path: Some(at("llama3_special_tokens.json")),
            format: MessageFormat::Llama3,
            ..TokenizerPlan::plain(at("llama3.model"))
        },
        "llama2" | "mistral" => {
            TokenizerPlan { format: MessageFormat::Turns, ..TokenizerPlan::plain(at("llama2.model")) }
        }
        _ => TokenizerPlan {
            merges_file: Some(at("merges.txt")),
            format: match name {
                "qwen2" => MessageFormat::Qwen2,
                "qwen2_5" => MessageFormat::Qwen2_5,
                _ => MessageFormat::Qwen3,
            },
            ..TokenizerPlan::plain(at("vocab.json"))
        },
    }
}

/// Ids are those of tiktoken, SentencePiece and torchtune's Qwen tokenizer.
#[test]
fn texts_have_the_ids_of_the_originals() {
    let cases: Vec<Value> = serde_json::from_slice(&std::fs::read(tokenizers().join("texts.json")).unwrap()).unwrap();
    assert!(cases.len() > 100);
    for case in cases {
        let tokenizer = Tokenizer::of(&family(case["family"].as_str().unwrap())).unwrap();
        let expected: Vec<u64> = serde_json::from_value(case["ids"].clone()).unwrap();
        let Some(text) = case["text"].as_str() else {
            // The text of 86,001 characters by its number of ids and their weighted sum.
            let long = format!("{}{}y", "x".repeat(60_000), " ".repeat(26_000));
            let ids = tokenizer.encode(&long).unwrap();
            let sum = (0..).zip(&ids).fold(0u64, |sum, (index, id)| (sum + index * u64::from(*id)) % (1 << 31));
            assert_eq!([ids.len() as u64, sum].as_slice(), expected, "{}", case["family"]);
            continue;
        };
        let ids: Vec<u64> = tokenizer.encode(text).unwrap().into_iter().map(u64::from).collect();
        assert_eq!(ids, expected, "{} {text:?}", case["family"]);
        // Qwen's normalises; what the others read they can say.
        if case["family"] != "qwen2" {
            let ids: Vec<u32> = ids.iter().map(|id| *id as u32).collect();
            assert_eq!(
                tokenizer.decode(&ids).unwrap(),
                text.replace('▁', if case["family"] == "llama2" { " " } else { "▁" })
            );
        }
    }
}

#[test]
fn formats_have_the_tokens_torchtune_gives_them() {
    let llama3 = Tokenizer::of(&family("llama3")).unwrap();
    let id = |name: &str| llama3.inner.token_to_id(name).unwrap();
    assert_eq!(llama3.bos(), Some(id("<|begin_of_text|>")));
    assert_eq!((llama3.eos(), llama3.pad()), (id("<|end_of_text|>"), id("<|finetune_right_pad_id|>")));
    assert_eq!(llama3.stop_tokens(), [id("<|end_of_text|>"), id("<|eom_id|>"), id("<|eot_id|>")]);
    let llama2 = Tokenizer::of(&family("llama2")).unwrap();
    assert_eq!((llama2.bos(), llama2.eos(), llama2.pad()), (Some(1), 2, 0));
    assert_eq!(llama2.stop_tokens(), [2]);
    let qwen = Tokenizer::of(&family("qwen2_5")).unwrap();
    let id = |name: &str| qwen.inner.token_to_id(name).unwrap();
    assert_eq!((qwen.bos(), qwen.eos(), qwen.pad()), (None, id("<|im_end|>"), id("<|endoftext|>")));
    assert_eq!(qwen.stop_tokens(), [id("<|endoftext|>"), id("<|im_end|>")]);
    // The same files, other tokens of messages.
    let plain = TokenizerPlan { format: MessageFormat::Plain, ..family("llama3") };
    assert_ne!(Tokenizer::of(&plain).unwrap().digest(), llama3.digest());
}

#[track_caller]
fn check_fault(bytes: &[u8], plan: impl FnOnce(PathBuf) -> TokenizerPlan, expected: &str) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokenizer.model");
    std::fs::write(&path, bytes).unwrap();
    let error = Tokenizer::of(&plan(path)).unwrap_err();
    assert_eq!(error.exit_code(), 2, "{error}");
    let text = error.to_string().replace(&format!("{}/", folder.path().display()), "");
    assert!(text.contains(expected), "expected `{expected}` in:\n{text}");
}

#[test]
fn damaged_vocabularies_are_named() {
    let ranks = std::fs::read_to_string(family("llama3").path).unwrap();
    let tiktoken = |path| TokenizerPlan { path, ..family("llama3") };
    check_fault(b"", tiktoken, "`tokenizer.model` is empty");
    check_fault(b"some text\n", tiktoken, "`tokenizer.model` is not a tokenizer this version reads");
    check_fault(b"version https://git-lfs.github.com/spec/v1\n", tiktoken, "is a pointer of Git LFS");
    let bad = ranks.replacen("IQ== 33\n", "I!Q= 33\n", 1);
    check_fault(bad.as_bytes(), tiktoken, "tokenizer.model:34\ncause: `I!Q= 33` is not a token in base64 and its rank");
    let gap = ranks.replacen("IQ== 33\n", "", 1);
    check_fault(gap.as_bytes(), tiktoken, "cause: rank 34 is on the line of rank 33");
    check_fault(&ranks.as_bytes()[..900], tiktoken, "cause: `cA` is not a token in base64 and its rank");
    let few: String = ranks.split_inclusive('\n').take(100).collect();
    check_fault(few.as_bytes(), tiktoken, "cause: no token for the byte 0x64");
    check_fault(ranks.as_bytes(), TokenizerPlan::plain, "has 700 tokens, Llama 3's has 128000");
    let twice = format!("{ranks}IQ== {}\n", ranks.lines().count());
    check_fault(twice.as_bytes(), tiktoken, "cause: a token that an earlier line has");

    let pieces = std::fs::read(family("llama2").path).unwrap();
    let turns = |path| TokenizerPlan { path, ..family("llama2") };
    check_fault(&pieces[..3000], turns, "cause: a field of it ends beyond its message");
    let (first, rest) = pieces.split_at(pieces.len() - 1);
    assert!(!rest.is_empty());
    check_fault(first, turns, "is damaged, or not a SentencePiece model this version reads");
    // Only the first pieces: <unk> and <s>.
    check_fault(&pieces[..2 + usize::from(pieces[1])], turns, "cause: it has no trainer settings");

    let vocab = std::fs::read(family("qwen2").path).unwrap();
    check_fault(&vocab, TokenizerPlan::plain, "is a vocabulary without merges");
    let qwen = |path| TokenizerPlan { path, ..family("qwen2") };
    check_fault(&vocab[..vocab.len() - 5], qwen, "is damaged, or not a vocabulary this version reads");
    check_fault(&pieces, |path| TokenizerPlan { path, ..family("qwen2") }, "has its merges itself");
}

#[test]
fn a_format_needs_its_tokens() {
    let (_folder, tiny) = variant(|_| (), &[("tokenizer_config.json", r#"{"eos_token": "<|eot_id|>"}"#)]);
    let error = Tokenizer::of(&TokenizerPlan { format: MessageFormat::Qwen2, ..TokenizerPlan::plain(tiny.clone()) });
    let error = error.unwrap_err().to_string();
    assert!(error.contains("has no token `<|im_end|>`, which the message format needs"), "{error}");
    let error = Tokenizer::of(&TokenizerPlan { format: MessageFormat::ChatTemplate, ..TokenizerPlan::plain(tiny) });
    let error = error.unwrap_err().to_string();
    assert!(error.contains("there is no chat template beside"), "{error}");
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(100))]

    /// Whatever a disk or a network makes of a file: a tokenizer or an error, never a panic.
    #[test]
    fn a_mutated_vocabulary_is_read_or_refused(
        name in 0usize..4, cut in 0.0f64..1.3, edits in proptest::collection::vec((0.0f64..1.0, 0u8..), 0..4),
    ) {
        let (plan, file) = match name {
            0 => (family("llama3"), family("llama3").path),
            1 => (family("llama2"), family("llama2").path),
            2 => (family("qwen2"), family("qwen2").path),
            _ => (TokenizerPlan::plain(PathBuf::new()), fixture().join("tokenizer.json")),
        };
        let mut bytes = std::fs::read(file).unwrap();
        for (at, byte) in edits {
            let at = (at * bytes.len() as f64) as usize;
            bytes[at] = byte;
        }
        bytes.truncate((cut * bytes.len() as f64) as usize);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokenizer.json");
        std::fs::write(&path, bytes).unwrap();
        if let Ok(tokenizer) = Tokenizer::of(&TokenizerPlan { path, ..plan }) {
            let ids = tokenizer.encode("Grüße <|eot_id|> 日本語\n  x").unwrap();
            tokenizer.decode(&ids).unwrap();
        }
    }
}

/// A tiny Llama 3 tokenizer.json with a chat template beside it.
pub fn with_chat_template(template: &str) -> (tempfile::TempDir, TokenizerPlan) {
    let config = serde_json::json!({
        "bos_token": "<|begin_of_text|>", "eos_token": {"content": "<|eot_id|>"}, "chat_template": template,
    });
    let (folder, path) = variant(|_| (), &[("tokenizer_config.json", &config.to_string())]);
    (folder, TokenizerPlan { format: MessageFormat::ChatTemplate, ..TokenizerPlan::plain(path) })
}

#[test]
fn chat_templates_have_what_they_use() {
    let (_folder, plan) = with_chat_template(
        "{%- if not date is defined %}{% set date = strftime_now('%d %b %Y') %}{% endif %}\n\
         {%- set ns = namespace(n=0) %}\n\
         {%- for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{% set ns.n = ns.n + 1 %}\n\
         {{- m['content'].strip().split(' ')[0] + ({'a': [1, m.content]} | tojson) }}{% endfor %}\n\
         {{- bos_token ~ eos_token ~ date ~ ns.n }}{% if add_generation_prompt %}>{% endif %}\n",
    );
    let template = ChatTemplate::read(&plan).unwrap();
    let said = |role, content: &str| ChatMessage {
        role,
        content: Some(content.to_owned()),
        tool_calls: vec![],
        tool_call_id: None,
        name: None,
    };
    let messages = [said("system", "s"), said("user", " é <b> ")];
    let text = template.render(&messages, true).unwrap();
    assert_eq!(text, "é{\"a\": [1, \" é <b> \"]}<|begin_of_text|><|eot_id|>26 Jul 20241>");

    for (template, expected) in [
        ("{{ raise_exception('roles must alternate') }}", "line 1 of the chat template: roles must alternate"),
        ("{% for i in range(10000) %}{% for j in range(10000) %}{{ j }}{% endfor %}{% endfor %}", "fuel"),
        ("{{ messages[0].content.nonsense() }}", "no method named nonsense"),
        ("{{ strftime_now('%Q') }}", "`strftime_now` knows no `%Q`"),
    ] {
        let (_folder, plan) = with_chat_template(template);
        let error = ChatTemplate::read(&plan).unwrap().render(&messages, false).unwrap_err();
        assert!(error.contains(expected), "{error}");
    }
    let (_folder, plan) = with_chat_template("{% if %}");
    let error = Tokenizer::of(&plan).unwrap_err().to_string();
    assert!(error.contains("cannot be read\ncause: line 1 of the chat template"), "{error}");
}
