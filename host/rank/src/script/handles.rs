//! Numbers for objects: what a guest holds instead of the object.
//!
//! A slot is freed when the guest drops its handle, never before, so a number cannot come to mean something else while a
//! guest still has it. What dies with a step leaves a tombstone in its slot.

use wasmtime::component::Resource;

/// Objects of one kind by handle.
pub struct Slab<T: 'static> {
    slots: Vec<Option<T>>,
    free: Vec<u32>,
}

impl<T> Default for Slab<T> {
    fn default() -> Self {
        Self { slots: vec![], free: vec![] }
    }
}

impl<T: 'static> Slab<T> {
    pub fn insert(&mut self, value: T) -> Resource<T> {
        let rep = match self.free.pop() {
            Some(rep) => {
                self.slots[rep as usize] = Some(value);
                rep
            }
            None => {
                self.slots.push(Some(value));
                (self.slots.len() - 1) as u32
            }
        };
        Resource::new_own(rep)
    }

    /// `None` is a defect of a front: the component model and the Rhai handles only know numbers they were given.
    pub fn get(&self, handle: &Resource<T>) -> Option<&T> {
        self.slots.get(handle.rep() as usize)?.as_ref()
    }

    pub fn remove(&mut self, handle: &Resource<T>) -> Option<T> {
        let value = self.slots.get_mut(handle.rep() as usize)?.take()?;
        self.free.push(handle.rep());
        Some(value)
    }

    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.slots.iter_mut().flatten()
    }

    pub fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }
}
