//! Templates that no compiler makes: what they give back is written by hand, byte for byte.

use host::config::plan::{GuestLimits, GuestRef};
use host::data::template::{Cell, Outcome, Row};
use host_rank::script::{SDK_VERSION, isolate, template};
use insta::assert_snapshot;
use serde_json::json;

use crate::handmade::FAILURE;
use crate::support::tight;

/// A template with these two functions over memory that begins with `data`. Its allocator never frees. Types that an exported
/// function mentions have names of their own.
fn component(configure: &str, render: &str, data: &[u8]) -> Vec<u8> {
    let bytes: String = data.iter().map(|byte| format!("\\{byte:02x}")).collect();
    let text = format!(
        r#"(component
            (import "host:sdk/types@{SDK_VERSION}" (instance $types
                {FAILURE}
                (type $v (variant (case "none") (case "flag" bool) (case "int" s64) (case "num" f64) (case "text" string)))
                (export "value" (type $value (eq $v)))
                (type $s (record (field "name" string) (field "value" $value)))
                (export "setting" (type $setting (eq $s)))))
            (alias export $types "failure" (type $failure))
            (alias export $types "setting" (type $setting))
            (type $r (enum "system" "user" "assistant" "tool"))
            (export $role "role" (type $r))
            (type $m' (record (field "role" $role) (field "parts" (list string)) (field "calls" (list string))
                (field "train" (option bool))))
            (export $message "message" (type $m'))
            (type $c' (variant (case "none") (case "text" string) (case "messages" (list $message))))
            (export $cell "cell" (type $c'))
            (type $w (record (field "id" s64) (field "cells" (list $cell))))
            (export $row "row" (type $w))
            (type $p (record (field "chosen" (list $message)) (field "rejected" (list $message))))
            (export $preference "preference" (type $p))
            (type $o (variant (case "keep" (list $message)) (case "pair" $preference) (case "skip" string)
                (case "fail" string)))
            (export $outcome "outcome" (type $o))
            (core module $m (memory (export "memory") 2) (global $top (mut i32) (i32.const 65536))
                (func (export "realloc") (param i32 i32 i32 i32) (result i32) (local $at i32)
                    (local.set $at (i32.and (i32.add (global.get $top) (i32.const 15)) (i32.const -16)))
                    (global.set $top (i32.add (local.get $at) (local.get 3)))
                    (local.get $at))
                (func (export "configure") (param i32 i32 i32 i32) (result i32) {configure})
                (func (export "render") (param i32 i32) (result i32) {render})
                (data (i32.const 0) "{bytes}"))
            (core instance $i (instantiate $m))
            (func $configure (param "settings" (list $setting)) (param "columns" (list string))
                (result (result (list string) (error $failure)))
                (canon lift (core func $i "configure") (memory $i "memory") (realloc (func $i "realloc"))))
            (func $render (param "rows" (list $row)) (result (result (list $outcome) (error $failure)))
                (canon lift (core func $i "render") (memory $i "memory") (realloc (func $i "realloc"))))
            (instance $rows (export "configure" (func $configure)) (export "render" (func $render)))
            (export "host:sdk/rows@{SDK_VERSION}" (instance $rows)))"#
    );
    wat::parse_str(&text).unwrap_or_else(|error| panic!("{error}"))
}

/// What is laid out from address 0 on: words of 32 bits.
fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// One that says of every batch that it has `count` outcomes, each one message: its role, and its part's address and length.
fn says(count: u32, role: u32, part: [u32; 2]) -> Vec<u8> {
    // 0: no columns. 16: the outcomes. 32: the message. 64: its part. 72: no UTF-8. 80: an outcome, and the same again.
    let mut data = words(&[0, 0, 0, 0, 0, 80, count, 0, role, 64, 1, 0, 0, 0, 0, 0, part[0], part[1], 0xff, 0]);
    for _ in 0..8 {
        data.extend(words(&[0, 32, 1, 0, 0]));
    }
    component("(i32.const 0)", "(i32.const 16)", &data)
}

/// What it makes of three rows, or what is said of it: in this process and in one of its own, or the test fails.
fn outcomes(component: &[u8]) -> Result<Vec<Outcome>, String> {
    let guest = GuestRef { path: "t.wasm".into(), settings: json!({}) };
    let program = std::path::Path::new(env!("CARGO_BIN_EXE_host-rank"));
    let limits = GuestLimits { seconds: 1.0, ..tight() };
    let [here, isolated] = [false, true].map(|is_isolated| {
        let opened = if is_isolated {
            isolate::open_with(program, &guest, component.to_vec(), &limits)
        } else {
            template::open_bytes(&guest, component.to_vec(), &limits)
        };
        let mut template = opened.and_then(|template| template.open()).map_err(|error| error.to_string())?;
        let rows = (4..7).map(|id| Row { id, cells: vec![Cell::Text("x".into())] }).collect();
        let columns = template.configure(&["input".to_owned()]);
        columns.and_then(|_| template.render(rows)).map_err(|error| error.to_string())
    });
    assert_eq!(here, isolated);
    here
}

fn report(component: &[u8]) -> String {
    outcomes(component).unwrap_err()
}

#[test]
fn a_template_of_fitting_bytes_is_one() {
    let outcomes = outcomes(&says(3, 1, [64, 4])).unwrap();
    assert!(outcomes.iter().all(|outcome| matches!(outcome, Outcome::Keep(messages) if messages.len() == 1)));
}

#[test]
fn a_template_gives_an_outcome_for_each_row() {
    assert_snapshot!(report(&says(2, 1, [64, 4])), @"
    error: template `t.wasm` failed on rows 4 to 6
    cause: it gave back 2 outcomes for 3 rows
    ");
    assert_snapshot!(report(&says(4, 1, [64, 4])), @"
    error: template `t.wasm` failed on rows 4 to 6
    cause: it gave back 4 outcomes for 3 rows
    ");
    assert_snapshot!(report(&says(0, 1, [64, 4])), @"
    error: template `t.wasm` failed on rows 4 to 6
    cause: it gave back 0 outcomes for 3 rows
    ");
    assert_snapshot!(report(&says(1 << 28, 1, [64, 4])), @"
    error: template `t.wasm` failed on rows 4 to 6
    cause: what it hands over does not read as the SDK's types
    cause: list pointer/length out of bounds of memory
    hint: make it with the SDK, or with tools that read `sdk/wit`
    ");
}

#[test]
fn a_template_gives_what_the_types_allow() {
    // A fifth role; a text beyond memory; a text that is no UTF-8; a result that is neither; an address that is odd.
    assert_snapshot!(report(&says(3, 4, [64, 4])), @"
    error: template `t.wasm` failed on rows 4 to 6
    cause: what it hands over does not read as the SDK's types
    cause: unexpected discriminant: 4
    hint: make it with the SDK, or with tools that read `sdk/wit`
    ");
    assert_snapshot!(report(&says(3, 1, [131_070, 4])), @"
    error: template `t.wasm` failed on rows 4 to 6
    cause: what it hands over does not read as the SDK's types
    cause: string pointer/length out of bounds of memory
    hint: make it with the SDK, or with tools that read `sdk/wit`
    ");
    assert_snapshot!(report(&says(3, 1, [72, 1])), @"
    error: template `t.wasm` failed on rows 4 to 6
    cause: what it hands over does not read as the SDK's types
    cause: invalid utf-8 sequence of 1 bytes from index 0
    hint: make it with the SDK, or with tools that read `sdk/wit`
    ");
    assert_snapshot!(report(&component("(i32.const 0)", "(i32.const 0)", &words(&[7, 0, 0]))), @"
    error: template `t.wasm` failed on the columns input
    cause: what it hands over does not read as the SDK's types
    cause: invalid expected discriminant
    hint: make it with the SDK, or with tools that read `sdk/wit`
    ");
    assert_snapshot!(report(&component("(i32.const 0)", "(i32.const 3)", &words(&[0; 4]))), @"
    error: template `t.wasm` failed on rows 4 to 6
    cause: what it hands over does not read as the SDK's types
    cause: return pointer not aligned
    hint: make it with the SDK, or with tools that read `sdk/wit`
    ");
    assert_snapshot!(report(&component("(i32.const 0)", "unreachable", &words(&[0; 4]))), @"
    error: template `t.wasm` failed on rows 4 to 6
    cause: the guest stopped itself (`unreachable`)
    hint: an exception that a JavaScript or Python guest does not catch ends so: catch it, and give back a failure
    ");
    assert_snapshot!(report(&component("unreachable", "unreachable", &words(&[0; 4]))), @"
    error: template `t.wasm` failed on the columns input
    cause: the guest stopped itself (`unreachable`)
    hint: an exception that a JavaScript or Python guest does not catch ends so: catch it, and give back a failure
    ");
    assert_snapshot!(report(&component("(i32.const 0)", "(loop (br 0)) unreachable", &words(&[0; 4]))), @"
    error: template `t.wasm` failed on rows 4 to 6
    cause: the guest computed for more than 1 s without a turn of its loop
    hint: look for a loop that does not end; work on many numbers belongs into tensor operations
    ");
    assert_snapshot!(report(&component("(loop (br 0)) unreachable", "unreachable", &words(&[0; 4]))), @"
    error: template `t.wasm` failed on the columns input
    cause: the guest computed for more than 1 s without a turn of its loop
    hint: look for a loop that does not end; work on many numbers belongs into tensor operations
    ");
}
