//! Losses: guests that say how far a model's scores are from what they should be, whatever recipe asks.

use host::config::plan::{GuestLimits, GuestRef};
use host::worker::StopFlag;
use host::{Error, Result};
use rhai::{AST, CallFnOptions, Dynamic, Engine, Map, Scope};
use tch::Tensor;
use wasmtime::Store;
use wasmtime::component::{HasSelf, Linker, Resource};

use super::api::{HostError, HostResult, HostState, tensors, types};
use super::guest::{self, Blame, Guest, World};
use super::rhai::{Front, Handle, Shared, explain, parse};
use super::rhai_generated;
use super::settings::Settings;
use super::template::digest;
use super::tensors::TensorSlot;
use super::wasm::{self, GuestData};
use crate::train::Loss;

mod wit {
    wasmtime::component::bindgen!({
        path: "../../sdk/wit/0.1.0",
        world: "loss",
        imports: { default: trappable },
        with: {
            "host:sdk/types@0.1.0": crate::script::api::types,
            "host:sdk/tensors@0.1.0": crate::script::api::tensors,
        },
    });
}

/// Reads, checks and configures a loss.
pub fn open_loss(guest: &GuestRef, limits: &GuestLimits) -> Result<Box<dyn Loss>> {
    LossGuest::load(guest, limits)?.open()
}

/// A loss guest that was read and checked.
pub struct LossGuest {
    guest: Guest,
    digest: String,
    blame: Blame,
    settings: Settings,
    limits: GuestLimits,
}

impl LossGuest {
    pub fn load(guest: &GuestRef, limits: &GuestLimits) -> Result<Self> {
        let content = guest::read(&guest.path, World::Loss, limits)?;
        let digest = digest(match &content {
            Guest::Component(bytes) => bytes,
            Guest::Script(text) => text.as_bytes(),
        });
        let blame = Blame { world: World::Loss, path: guest.path.clone(), place: None };
        let settings = Settings::of(guest, World::Loss)?;
        Ok(Self { guest: content, digest, blame, settings, limits: limits.clone() })
    }

    pub fn digest(&self) -> &str {
        &self.digest
    }

    pub fn open(self) -> Result<Box<dyn Loss>> {
        let state = HostState::new(&self.blame.path.display().to_string(), &self.limits, StopFlag::default(), None);
        match &self.guest {
            Guest::Component(bytes) => ComponentLoss::open(bytes, state, &self),
            Guest::Script(text) => ScriptLoss::open(text, state, &self),
        }
    }
}

/// What a guest gave back is a loss, or what is wrong with it.
fn checked(
    host: &mut HostState,
    sum: &Resource<TensorSlot>,
    weight: f64,
    needs_gradient: bool,
) -> HostResult<(Tensor, f64)> {
    let sum = host.tensor(sum)?.shallow_clone();
    let shape = sum.size();
    if sum.numel() != 1 {
        let message = format!("the sum of a loss is a tensor of one element, not one of shape {shape:?}");
        return Err(HostError::guest(types::Code::Shape, message).hint("call `.sum()` on it"));
    }
    if needs_gradient && weight > 0.0 && !sum.requires_grad() {
        let message = "the sum has no gradient: nothing of the scores went into it";
        return Err(HostError::guest(types::Code::Invalid, message).hint("build it from `logits`, without `detach`"));
    }
    if !(weight.is_finite() && weight >= 0.0) {
        let message = format!("the weight of a loss must be a finite number, not below 0, and is {weight}");
        let hint = "give what the sum is summed over: the number of labels for a loss over label tokens";
        return Err(HostError::guest(types::Code::Invalid, message).hint(hint));
    }
    Ok((sum, weight))
}

// ---- Components

struct ComponentLoss {
    store: Store<GuestData>,
    loss: wit::Loss,
    blame: Blame,
}

impl ComponentLoss {
    fn open(bytes: &[u8], state: HostState, guest: &LossGuest) -> Result<Box<dyn Loss>> {
        let path = &guest.blame.path;
        let component = wasm::compile(path, bytes, &guest.limits)?;
        let mut linker = Linker::new(wasm::engine()?);
        wasm::link_inert_wasi(&mut linker)
            .and_then(|()| wit::Loss::add_to_linker::<_, HasSelf<HostState>>(&mut linker, |guest| &mut guest.host))
            .map_err(|error| Error::bug("cannot link the SDK").cause(format!("{error:#}")))?;
        let pre = linker.instantiate_pre(&component).and_then(wit::LossPre::new);
        let pre = pre.map_err(|error| wasm::link_error(path, error))?;
        let mut store = wasm::new_store(state, &guest.limits)?;
        let blame = Blame { world: World::Loss, path: path.clone(), place: None };
        let loss = match pre.instantiate(&mut store) {
            Ok(loss) => loss,
            Err(error) => return Err(wasm::explain(&blame, store.data_mut(), &error)),
        };
        let mut this = Self { store, loss, blame };
        this.store.data_mut().host.clock.restart();
        let configured = this.loss.host_sdk_scoring().call_configure(&mut this.store, guest.settings.for_component());
        wasm::ended(&this.blame, &mut this.store, configured)?;
        Ok(Box::new(this))
    }
}

fn ended_host(blame: &Blame, error: HostError) -> Error {
    match error.into_failure() {
        super::api::Failure::Run(error) => error,
        super::api::Failure::Guest(mistake) => blame.mistake(mistake),
    }
}

impl Loss for ComponentLoss {
    fn compute(&mut self, logits: &Tensor, labels: &Tensor) -> Result<(Tensor, f64)> {
        let needs_gradient = logits.requires_grad();
        let host = &mut self.store.data_mut().host;
        host.device = Some(logits.device());
        host.begin_call();
        let lent = [logits, labels].map(|tensor| host.lend(tensor));
        let failed = |error| ended_host(&self.blame, error);
        let [logits, labels] = lent;
        let (logits, labels) = (logits.map_err(failed)?, labels.map_err(failed)?);
        let outcome = self.loss.host_sdk_scoring().call_compute(
            &mut self.store,
            Resource::new_borrow(logits.rep()),
            Resource::new_borrow(labels.rep()),
        );
        let given = wasm::ended(&self.blame, &mut self.store, outcome)?;
        let host = &mut self.store.data_mut().host;
        let loss = checked(host, &given.sum, given.weight, needs_gradient);
        for handle in [&given.sum, &logits, &labels] {
            host.release(handle);
        }
        host.end_call();
        loss.map_err(|error| ended_host(&self.blame, error))
    }
}

// ---- Scripts

struct ScriptLoss {
    engine: Engine,
    shared: Shared,
    script: AST,
    settings: Option<Map>,
    blame: Blame,
}

impl ScriptLoss {
    fn open(text: &str, state: HostState, guest: &LossGuest) -> Result<Box<dyn Loss>> {
        let path = &guest.blame.path;
        let (engine, shared) = loss_engine(state, &guest.limits);
        let script = parse(path, text, &engine)?;
        let takes = |count: usize| script.iter_functions().any(|f| f.name == "loss" && f.params.len() == count);
        let settings = match (takes(2), takes(3)) {
            (_, true) => Some(guest.settings.for_script(&shared)),
            (true, false) => {
                guest.settings.must_be_none(path, World::Loss, "fn loss(logits, labels, settings)")?;
                None
            }
            (false, false) => {
                return Err(Error::config(format!("the script `{}` is not a loss", path.display()))
                    .cause("it has no function `loss(logits, labels)`, and none with `settings` as third")
                    .hint("it gives back `#{ sum: …, weight: … }`"));
            }
        };
        let blame = Blame { world: World::Loss, path: path.clone(), place: None };
        Ok(Box::new(Self { engine, shared, script, settings, blame }))
    }

    fn call(&mut self, logits: &Tensor, labels: &Tensor) -> Result<(Tensor, f64)> {
        use super::rhai::Convert;
        let lend = |tensor: &Tensor| {
            let lent = self.shared.borrow_mut().lend(tensor);
            lent.map(|handle| Dynamic::from(handle.to_rhai(&self.shared)))
                .map_err(|error| ended_host(&self.blame, error))
        };
        let mut arguments = vec![lend(logits)?, lend(labels)?];
        arguments.extend(self.settings.clone().map(Dynamic::from));
        let options = CallFnOptions::new().eval_ast(true);
        let outcome: std::result::Result<Dynamic, _> =
            self.engine.call_fn_with_options(options, &mut Scope::new(), &self.script, "loss", arguments);
        let given = outcome.map_err(|error| explain(&self.blame, &mut self.shared.borrow_mut(), &error))?;
        let wrong = |found: &str| {
            let cause = format!("`loss` gave back {found}, not a sum and a weight");
            self.blame.error().cause(cause).hint("give back `#{ sum: …, weight: … }`: a tensor, and a number")
        };
        let kind = self.engine.map_type_name(given.type_name());
        let given = given.try_cast::<Map>().ok_or_else(|| wrong(&format!("a value of type {kind}")))?;
        let sum = given.get("sum").and_then(|sum| sum.clone().try_cast::<Handle<tensors::Tensor>>());
        let sum = sum.ok_or_else(|| wrong("a map without a tensor `sum`"))?;
        let weight = given
            .get("weight")
            .and_then(|weight| weight.as_float().ok().or_else(|| weight.as_int().ok().map(|weight| weight as f64)));
        let weight = weight.ok_or_else(|| wrong("a map without a number `weight`"))?;
        let loss = checked(&mut self.shared.borrow_mut(), &sum.resource(), weight, logits.requires_grad());
        loss.map_err(|error| ended_host(&self.blame, error))
    }
}

impl Loss for ScriptLoss {
    fn compute(&mut self, logits: &Tensor, labels: &Tensor) -> Result<(Tensor, f64)> {
        self.shared.borrow_mut().device = Some(logits.device());
        self.shared.borrow_mut().begin_call();
        let loss = self.call(logits, labels);
        self.shared.borrow_mut().end_call();
        loss
    }
}

pub fn loss_engine(state: HostState, limits: &GuestLimits) -> (Engine, Shared) {
    let mut front = Front::new(state, limits);
    rhai_generated::register_types(&mut front);
    rhai_generated::register_tensors(&mut front);
    front.finish()
}
