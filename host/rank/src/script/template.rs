//! Templates: guests that turn rows into messages, opened once per data worker.
//!
//! The data path hands over rows in batches of its own size; a component is given them in pieces that its limits are made
//! for. A template that failed repeats its first error, since what it would do next means nothing.

use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;

use host::config::plan::{GuestLimits, GuestRef};
use host::data::template::{Cell, MESSAGES, Message, OpenTemplate, Outcome, Role, Row, RowTemplate, SharedTemplate};
use host::worker::StopFlag;
use host::{Error, Result};
use rhai::{AST, Array, CallFnOptions, Dynamic, Engine, EvalAltResult, ImmutableString, Map, Position, Scope};
use serde_json::Value;
use wasmtime::Store;
use wasmtime::component::{HasSelf, Linker};

use super::api::HostState;
use super::guest::{self, Blame, Guest, SDK_VERSION, World};
use super::rhai::{Front, RhaiResult, Shared, explain, parse};
use super::settings::Settings;
use super::wasm::{self, GuestData};
use super::{isolate, log, rhai_generated};

mod wit {
    wasmtime::component::bindgen!({
        path: "../../sdk/wit/0.1.0",
        world: "template",
        imports: { default: trappable },
        with: { "host:sdk/types@0.1.0": crate::script::api::types },
    });
}

use wit::exports::host::sdk::rows;

/// Rows that go to a component in one call.
const MAX_BATCH_ROWS: usize = 256;
/// Bytes of cells that go to a component in one call; a longer row goes alone.
const MAX_BATCH_BYTES: usize = 1 << 20;

/// Reads, checks and compiles a template, so that opening it later cannot fail for what its file says.
pub fn open_template(guest: &GuestRef, limits: &GuestLimits) -> Result<SharedTemplate> {
    let bytes = guest::bytes_of(&guest.path, World::Template.noun(), limits)?;
    if limits.isolate { isolate::open_template(guest, bytes, limits) } else { open_bytes(guest, bytes, limits) }
}

/// The same in this process, with the file's content.
pub fn open_bytes(guest: &GuestRef, bytes: Vec<u8>, limits: &GuestLimits) -> Result<SharedTemplate> {
    let settings = Settings::of(guest, World::Template)?;
    let (path, limits) = (guest.path.clone(), limits.clone());
    let digest = digest_with_settings(guest, &bytes);
    Ok(match guest::of_bytes(&path, bytes, World::Template)? {
        Guest::Component(bytes) => {
            let pre = load_component(&path, &bytes, &limits)?;
            Arc::new(ComponentTemplate { digest, blame: Blame::template(&path), settings, limits, pre })
        }
        Guest::Script(text) => {
            let template = ScriptTemplate { digest, path, text, settings, limits };
            template.open()?;
            Arc::new(template)
        }
    })
}

/// Of a guest's content, for this SDK.
pub fn digest(bytes: &[u8]) -> String {
    let mut hasher = blake3::Hasher::new();
    hasher.update(SDK_VERSION.as_bytes()).update(&[0]).update(bytes);
    hasher.finalize().to_string()
}

pub(super) fn digest_with_settings(guest: &GuestRef, bytes: &[u8]) -> String {
    format!("{} {}", digest(bytes), guest.settings)
}

impl Blame {
    fn template(path: &Path) -> Self {
        Self { world: World::Template, path: path.to_owned(), place: None }
    }
}

pub(super) fn rows_place(rows: &[Row]) -> Option<String> {
    match rows {
        [] => None,
        [row] => Some(format!("on row {}", row.id)),
        [first, .., last] => Some(format!("on rows {} to {}", first.id, last.id)),
    }
}

// ---- Components

#[derive(Clone)]
struct ComponentTemplate {
    digest: String,
    blame: Blame,
    settings: Settings,
    limits: GuestLimits,
    pre: wit::TemplatePre<GuestData>,
}

fn load_component(path: &Path, bytes: &[u8], limits: &GuestLimits) -> Result<wit::TemplatePre<GuestData>> {
    let component = wasm::compile(path, bytes, limits)?;
    let mut linker = Linker::new(wasm::engine()?);
    wasm::link_inert_wasi(&mut linker)
        .and_then(|()| wit::Template::add_to_linker::<_, HasSelf<HostState>>(&mut linker, |guest| &mut guest.host))
        .map_err(|error| Error::bug("cannot link the SDK").cause(format!("{error:#}")))?;
    linker.instantiate_pre(&component).and_then(wit::TemplatePre::new).map_err(|error| wasm::link_error(path, error))
}

impl ComponentTemplate {
    fn instance(&self, state: HostState) -> Result<(Store<GuestData>, wit::Template)> {
        let mut store = wasm::new_store(state, &self.limits)?;
        match self.pre.instantiate(&mut store) {
            Ok(template) => Ok((store, template)),
            Err(error) => Err(wasm::explain(&self.blame, store.data_mut(), &error)),
        }
    }

    fn state(&self) -> HostState {
        HostState::new(&self.name(), &self.limits, StopFlag::default(), None)
    }
}

impl OpenTemplate for ComponentTemplate {
    fn open(&self) -> Result<Box<dyn RowTemplate>> {
        let (store, template) = self.instance(self.state())?;
        let blame = Blame::template(&self.blame.path);
        Ok(Box::new(ComponentRows { of: self.clone(), store, template, blame, failure: None }))
    }

    fn digest(&self) -> String {
        self.digest.clone()
    }

    fn name(&self) -> String {
        self.blame.path.display().to_string()
    }
}

struct ComponentRows {
    of: ComponentTemplate,
    store: Store<GuestData>,
    template: wit::Template,
    blame: Blame,
    /// The first error; the store is of no use after it.
    failure: Option<Error>,
}

impl ComponentRows {
    /// Calls the guest, unless it failed before.
    fn guarded<T>(&mut self, work: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        if let Some(failure) = &self.failure {
            return Err(failure.clone());
        }
        self.store.data_mut().host.clock.restart();
        work(self).inspect_err(|error| self.failure = Some(error.clone()))
    }

    fn render_batch(&mut self, batch: Vec<Row>, outcomes: &mut Vec<Outcome>) -> Result<()> {
        self.blame.place = rows_place(&batch);
        let needed = batch.len();
        let rows: Vec<rows::Row> = batch.into_iter().map(rows::Row::from).collect();
        let outcome = self.template.host_sdk_rows().call_render(&mut self.store, &rows);
        let rendered = wasm::ended(&self.blame, &mut self.store, outcome)?;
        if rendered.len() != needed {
            let got = rendered.len();
            return Err(self.blame.error().cause(format!("it gave back {got} outcomes for {needed} rows")));
        }
        outcomes.extend(rendered.into_iter().map(Outcome::from));
        Ok(())
    }
}

impl RowTemplate for ComponentRows {
    fn renew(&mut self) -> Result<()> {
        self.guarded(|this| {
            let mut state = this.of.state();
            // Its lines stay counted.
            state.log = this.store.data_mut().host.log.clone();
            (this.store, this.template) = this.of.instance(state)?;
            Ok(())
        })
    }

    fn configure(&mut self, columns: &[String]) -> Result<Vec<String>> {
        self.guarded(|this| {
            this.blame.place = Some(format!("on the columns {}", columns.join(", ")));
            let (rows, settings) = (this.template.host_sdk_rows(), this.of.settings.for_component());
            let outcome = rows.call_configure(&mut this.store, settings, columns);
            wasm::ended(&this.blame, &mut this.store, outcome)
        })
    }

    fn render(&mut self, rows: Vec<Row>) -> Result<Vec<Outcome>> {
        let mut outcomes = Vec::with_capacity(rows.len());
        let mut rest = rows;
        while !rest.is_empty() {
            let later = rest.split_off(batch_len(&rest));
            self.guarded(|this| this.render_batch(rest, &mut outcomes))?;
            rest = later;
        }
        Ok(outcomes)
    }
}

/// How many of `rows` go into one call: at least one.
pub(super) fn batch_len(rows: &[Row]) -> usize {
    let mut bytes = 0;
    let fit = rows.iter().take(MAX_BATCH_ROWS).take_while(|row| {
        bytes += row.cells.iter().map(text_bytes).sum::<usize>();
        bytes <= MAX_BATCH_BYTES
    });
    fit.count().max(1)
}

fn text_bytes(cell: &Cell) -> usize {
    match cell {
        Cell::None => 0,
        Cell::Text(text) => text.len(),
        Cell::Messages(messages) => {
            messages.iter().flat_map(|message| message.parts.iter().chain(&message.calls)).map(String::len).sum()
        }
    }
}

impl From<Row> for rows::Row {
    fn from(row: Row) -> Self {
        Self { id: row.id as i64, cells: row.cells.into_iter().map(rows::Cell::from).collect() }
    }
}

impl From<Cell> for rows::Cell {
    fn from(cell: Cell) -> Self {
        match cell {
            Cell::None => Self::None,
            Cell::Text(text) => Self::Text(text),
            Cell::Messages(messages) => Self::Messages(messages.into_iter().map(rows::Message::from).collect()),
        }
    }
}

impl From<rows::Outcome> for Outcome {
    fn from(outcome: rows::Outcome) -> Self {
        match outcome {
            rows::Outcome::Keep(messages) => Self::Keep(messages.into_iter().map(Message::from).collect()),
            rows::Outcome::Pair(rows::Preference { chosen, rejected }) => {
                Self::Pair([chosen, rejected].map(|side| side.into_iter().map(Message::from).collect()))
            }
            rows::Outcome::Skip(reason) => Self::Skip(log::clean_line(&reason)),
            rows::Outcome::Fail(reason) => Self::Fail(log::clean_line(&reason)),
        }
    }
}

impl From<Message> for rows::Message {
    fn from(message: Message) -> Self {
        let role = match message.role {
            Role::System => rows::Role::System,
            Role::User => rows::Role::User,
            Role::Assistant => rows::Role::Assistant,
            Role::Tool => rows::Role::Tool,
        };
        Self { role, parts: message.parts, calls: message.calls, train: message.train }
    }
}

impl From<rows::Message> for Message {
    fn from(message: rows::Message) -> Self {
        let role = match message.role {
            rows::Role::System => Role::System,
            rows::Role::User => Role::User,
            rows::Role::Assistant => Role::Assistant,
            rows::Role::Tool => Role::Tool,
        };
        Self { role, parts: message.parts, calls: message.calls, train: message.train }
    }
}

// ---- Scripts

/// A function of a script that is given the settings.
pub const TAKES_SETTINGS: &str = "fn render(row, settings)";

/// How many arguments a script's `render` or `configure` takes: 1, or 2 with the settings.
fn arguments(script: &AST, name: &str) -> Option<usize> {
    let counts = script.iter_functions().filter(|function| function.name == name).map(|function| function.params.len());
    counts.filter(|count| (1..=2).contains(count)).max()
}

pub fn takes_settings(script: &AST) -> bool {
    ["render", "configure"].into_iter().any(|name| arguments(script, name) == Some(2))
}

struct ScriptTemplate {
    digest: String,
    path: std::path::PathBuf,
    text: String,
    settings: Settings,
    limits: GuestLimits,
}

/// A message as a script handles it. Copies share the parts: filling an array with one takes no more than their handles.
#[derive(Clone)]
struct ScriptMessage {
    role: Role,
    parts: Rc<Vec<ImmutableString>>,
    calls: Rc<Vec<ImmutableString>>,
    train: Option<bool>,
}

/// What a script says of a row that is not one conversation.
#[derive(Clone)]
enum Verdict {
    Pair(Array, Array),
    Skip(ImmutableString),
    Fail(ImmutableString),
}

impl OpenTemplate for ScriptTemplate {
    fn open(&self) -> Result<Box<dyn RowTemplate>> {
        let state = HostState::new(&self.path.display().to_string(), &self.limits, StopFlag::default(), None);
        let (engine, shared) = template_engine(state, &self.limits);
        let script = parse(&self.path, &self.text, &engine)?;
        let Some(render) = arguments(&script, "render") else {
            return Err(Error::config(format!("the script `{}` is not a template", self.path.display()))
                .cause("it has no function `render(row)`")
                .hint("a recipe is named by `recipe`, a template by the data set or the tokenizer"));
        };
        let configure = arguments(&script, "configure");
        if !takes_settings(&script) {
            self.settings.must_be_none(&self.path, World::Template, TAKES_SETTINGS)?;
        }
        let settings = self.settings.for_script(&shared);
        let blame = Blame::template(&self.path);
        let limits = self.limits.clone();
        Ok(Box::new(ScriptRows {
            engine,
            shared,
            script,
            settings,
            render,
            configure,
            columns: vec![],
            limits,
            blame,
            failure: None,
        }))
    }

    fn digest(&self) -> String {
        self.digest.clone()
    }

    fn name(&self) -> String {
        self.path.display().to_string()
    }
}

/// Every function a template script can call, as Rhai describes it; a test compares them with the definition file.
pub fn signatures() -> Vec<String> {
    let limits = GuestLimits::default();
    template_engine(HostState::new("", &limits, StopFlag::default(), None), &limits).0.gen_fn_signatures(false)
}

pub fn template_engine(state: HostState, limits: &GuestLimits) -> (Engine, Shared) {
    let mut front = Front::new(state, limits);
    let longest = limits.script_string();
    rhai_generated::register_types(&mut front);
    for role in Role::ALL {
        let name = role.name();
        front.method(name, &["parts: String", "Message"], move |part: ImmutableString| ScriptMessage {
            role,
            parts: Rc::new(vec![part]),
            calls: Rc::default(),
            train: None,
        });
        front.method(name, &["parts: Array", "Message"], move |parts: Array| -> RhaiResult<ScriptMessage> {
            Ok(ScriptMessage { role, parts: texts(name, parts)?, calls: Rc::default(), train: None })
        });
    }
    front.method("pair", &["chosen: Array", "rejected: Array", "Verdict"], |chosen: Array, rejected: Array| {
        Verdict::Pair(chosen, rejected)
    });
    front.method("skip", &["reason: String", "Verdict"], |reason: ImmutableString| Verdict::Skip(reason));
    front.method("fail", &["reason: String", "Verdict"], |reason: ImmutableString| Verdict::Fail(reason));
    front.property("role", &["self: Message", "String"], |this: &mut ScriptMessage| -> ImmutableString {
        this.role.name().into()
    });
    front.property("text", &["self: Message", "String"], |this: &mut ScriptMessage| -> ImmutableString {
        match &this.parts[..] {
            [part] => part.clone(),
            parts => parts.iter().map(ImmutableString::as_str).collect::<String>().into(),
        }
    });
    front.property("parts", &["self: Message", "Array"], |this: &mut ScriptMessage| -> Array {
        this.parts.iter().map(|part| part.clone().into()).collect()
    });
    front.property("calls", &["self: Message", "Array"], |this: &mut ScriptMessage| -> Array {
        this.calls.iter().map(|call| call.clone().into()).collect()
    });
    front.method(
        "wrap",
        &["self: Message", "before: String", "after: String", "Message"],
        move |this: &mut ScriptMessage, before: ImmutableString, after: ImmutableString| -> RhaiResult<ScriptMessage> {
            // Parts share their text, so that no other limit sees how long they are together.
            if before.len() + after.len() + this.parts.iter().map(|part| part.len()).sum::<usize>() > longest {
                return Err(EvalAltResult::ErrorDataTooLarge("Text of a message".into(), Position::NONE).into());
            }
            let mut message = this.clone();
            if !before.is_empty() {
                Rc::make_mut(&mut message.parts).insert(0, before);
            }
            if !after.is_empty() {
                Rc::make_mut(&mut message.parts).push(after);
            }
            Ok(message)
        },
    );
    front
        .engine
        .register_type_with_name::<ScriptMessage>("Message")
        .register_type_with_name::<Verdict>("Verdict")
        .register_set("parts", |this: &mut ScriptMessage, parts: Array| -> RhaiResult<()> {
            this.parts = texts("parts", parts)?;
            Ok(())
        })
        .register_set("calls", |this: &mut ScriptMessage, calls: Array| -> RhaiResult<()> {
            let texts_of_maps = calls.into_iter().map(|call| match json(&call) {
                Some(json @ Value::Object(_)) => json.to_string().into(),
                _ => call,
            });
            this.calls = texts("calls", texts_of_maps.collect())?;
            Ok(())
        })
        .register_set("train", |message: &mut ScriptMessage, train: bool| message.train = Some(train));
    front.finish()
}

/// A script's value as JSON; none where there is no way to write it.
fn json(value: &Dynamic) -> Option<Value> {
    Some(if value.is_map() {
        let map = value.read_lock::<Map>()?;
        let fields = map.iter().map(|(key, value)| Some((key.to_string(), json(value)?)));
        Value::Object(fields.collect::<Option<_>>()?)
    } else if value.is_array() {
        Value::Array(value.read_lock::<Array>()?.iter().map(json).collect::<Option<_>>()?)
    } else if value.is_unit() {
        Value::Null
    } else if let Ok(text) = value.as_immutable_string_ref() {
        Value::from(text.as_str())
    } else if let Ok(flag) = value.as_bool() {
        flag.into()
    } else if let Ok(number) = value.as_int() {
        number.into()
    } else {
        serde_json::Number::from_f64(value.as_float().ok()?)?.into()
    })
}

fn texts(name: &str, values: Array) -> RhaiResult<Rc<Vec<ImmutableString>>> {
    let text = |value: Dynamic| {
        value.into_immutable_string().map_err(|kind| {
            let message = format!("`{name}` takes strings, and one of them is of type {kind}");
            let mut error = Map::new();
            error.insert("message".into(), message.into());
            EvalAltResult::ErrorRuntime(error.into(), Position::NONE).into()
        })
    };
    values.into_iter().map(text).collect::<RhaiResult<_>>().map(Rc::new)
}

struct ScriptRows {
    engine: Engine,
    shared: Shared,
    script: AST,
    settings: Map,
    /// How many arguments the function takes: the settings may follow the first.
    render: usize,
    /// Likewise; none where there is no such function.
    configure: Option<usize>,
    /// The columns that `render` sees.
    columns: Vec<String>,
    limits: GuestLimits,
    blame: Blame,
    failure: Option<Error>,
}

impl ScriptRows {
    /// Calls a function that takes `count` arguments.
    fn call(&mut self, function: &str, argument: Dynamic, count: usize) -> Result<Dynamic> {
        self.shared.borrow_mut().clock.restart();
        self.shared.borrow_mut().memory.restart();
        // A fresh scope each time: one row cannot leave anything to the next.
        let mut scope = Scope::new();
        let options = CallFnOptions::new().eval_ast(true);
        let mut arguments = vec![argument];
        arguments.extend((count > 1).then(|| self.settings.clone().into()));
        self.engine.call_fn_with_options(options, &mut scope, &self.script, function, arguments).map_err(|error| {
            let report = explain(&self.blame, &mut self.shared.borrow_mut(), &error);
            match *error {
                EvalAltResult::ErrorPropertyNotFound(..) | EvalAltResult::ErrorInFunctionCall(..) => {
                    report.hint(format!("the row's columns are {}; `column_map` names them", self.columns.join(", ")))
                }
                _ => report,
            }
        })
    }

    fn render_row(&mut self, row: Row) -> Result<Outcome> {
        self.blame.place = Some(format!("on row {}", row.id));
        let (bytes, most) = (row.cells.iter().map(text_bytes).sum::<usize>(), self.limits.script_string());
        if bytes > most {
            let why = format!("it has {bytes} bytes of text, and a script's values may have {most}");
            return Ok(Outcome::Fail(format!("{why}; `limits.memory_mb` raises it")));
        }
        let cells = row.cells.into_iter().map(|cell| match cell {
            Cell::Text(text) => ImmutableString::from(text).into(),
            Cell::None => Dynamic::UNIT,
            Cell::Messages(messages) => {
                let messages: Array = messages.into_iter().map(|m| Dynamic::from(ScriptMessage::from(m))).collect();
                messages.into()
            }
        });
        let map: Map = self.columns.iter().map(|column| column.as_str().into()).zip(cells).collect();
        let outcome = self.call("render", map.into(), self.render)?;
        let outcome = match outcome.try_cast_result::<Verdict>() {
            Ok(Verdict::Pair(chosen, rejected)) => {
                return Ok(Outcome::Pair([self.messages(chosen)?, self.messages(rejected)?]));
            }
            Ok(Verdict::Skip(reason)) => return Ok(Outcome::Skip(log::clean_line(&reason))),
            Ok(Verdict::Fail(reason)) => return Ok(Outcome::Fail(log::clean_line(&reason))),
            Err(outcome) => outcome,
        };
        let messages = outcome.into_array().map_err(|kind| self.no_messages(kind))?;
        Ok(Outcome::Keep(self.messages(messages)?))
    }

    fn no_messages(&self, found: &str) -> Error {
        let hint = "give back an array of `user(…)`, `assistant(…)`, `system(…)`, or `skip(reason)`, or `fail(reason)`";
        self.blame.error().cause(format!("`render` gave back {found}, not an array of messages")).hint(hint)
    }

    fn messages(&self, messages: Array) -> Result<Vec<Message>> {
        let message = |message: Dynamic| {
            let kind = message.type_name();
            message
                .try_cast::<ScriptMessage>()
                .ok_or_else(|| self.no_messages(&format!("an array with a value of type {kind}")))
        };
        let messages = messages.into_iter().map(message);
        // As much as a component may hand over; texts that a script's messages share are copied here.
        let (mut bytes, most) = (0, self.limits.hostcall_mb << 20);
        let mut kept = vec![];
        for message in messages {
            let ScriptMessage { role, parts, calls, train } = message?;
            let texts = parts.iter().chain(calls.iter());
            bytes += size_of::<Message>() + texts.map(|text| size_of::<String>() + text.len()).sum::<usize>();
            if bytes > most {
                let cause = format!("`render` gave back more than {most} bytes");
                return Err(self.blame.error().cause(cause).hint("`limits.hostcall_mb` raises the limit"));
            }
            let [parts, calls] = [parts, calls].map(|texts| texts.iter().map(ImmutableString::to_string).collect());
            kept.push(Message { role, parts, calls, train });
        }
        Ok(kept)
    }
}

impl From<Message> for ScriptMessage {
    fn from(Message { role, parts, calls, train }: Message) -> Self {
        let [parts, calls] = [parts, calls].map(|texts| texts.into_iter().map(ImmutableString::from).collect());
        Self { role, parts: Rc::new(parts), calls: Rc::new(calls), train }
    }
}

impl RowTemplate for ScriptRows {
    fn renew(&mut self) -> Result<()> {
        // Every call evaluates the script anew, in a scope of its own: there is nothing to forget.
        Ok(())
    }

    fn configure(&mut self, columns: &[String]) -> Result<Vec<String>> {
        // Without a word of its own it sees the config's columns; where there are none, the conversation.
        let named = columns.iter().filter(|column| *column != MESSAGES).cloned();
        self.columns = named.collect();
        if self.columns.is_empty() {
            self.columns = columns.to_vec();
        }
        if let Some(count) = self.configure {
            self.blame.place = Some(format!("on the columns {}", columns.join(", ")));
            let argument: Array = columns.iter().map(|column| Dynamic::from(column.clone())).collect();
            let chosen = self.call("configure", argument.into(), count).and_then(|chosen| self.chosen(chosen));
            if let Some(chosen) = chosen.inspect_err(|error| self.failure = Some(error.clone()))? {
                self.columns = chosen;
            }
        }
        Ok(self.columns.clone())
    }

    fn render(&mut self, rows: Vec<Row>) -> Result<Vec<Outcome>> {
        if let Some(failure) = &self.failure {
            return Err(failure.clone());
        }
        rows.into_iter()
            .map(|row| self.render_row(row))
            .collect::<Result<_>>()
            .inspect_err(|error: &Error| self.failure = Some(error.clone()))
    }
}

impl ScriptRows {
    /// The columns that `configure` gave back; nothing leaves the choice to the host.
    fn chosen(&self, chosen: Dynamic) -> Result<Option<Vec<String>>> {
        if chosen.is_unit() {
            return Ok(None);
        }
        let wrong = |kind: &str| {
            self.blame
                .error()
                .cause(format!("`configure` gave back {kind}, not an array of column names"))
                .hint("give back those that `render` reads, such as `[\"messages\"]`, or nothing")
        };
        let columns = chosen.into_array().map_err(wrong)?;
        let name = |column: Dynamic| column.into_string().map_err(|kind| wrong(&format!("an array with a {kind}")));
        columns.into_iter().map(name).collect::<Result<_>>().map(Some)
    }
}
