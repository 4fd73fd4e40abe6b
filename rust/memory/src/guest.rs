//! The guest's memory as it is now, while regions come and go (memory hotplug), and each user's view of it.

use crate::dirty::DirtyBitmap;
use crate::error::MemoryError;
use crate::mapping::Mapping;
use crate::region::{Region, RegionTable};
use std::ops::Deref;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{Acquire, Release};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

#[derive(Debug)]
struct Shared {
    table: Mutex<Arc<RegionTable>>,
    /// Counts the tables; written under the lock.
    generation: AtomicU64,
}

/// A set of regions that may change while it is used. Clones are the same set.
///
/// Each change makes a new table. A mapping that is no longer in it is unmapped when its last user (a view not refreshed yet, a span, a
/// ring) lets go.
#[derive(Clone, Debug)]
pub struct GuestMemory(Arc<Shared>);

impl Default for GuestMemory {
    fn default() -> Self {
        Self::new()
    }
}

impl GuestMemory {
    /// A guest without memory.
    pub fn new() -> Self {
        let table = RegionTable::new(Vec::new(), None).expect("no regions, no overlap");
        Self(Arc::new(Shared { table: Mutex::new(Arc::new(table)), generation: AtomicU64::new(0) }))
    }

    fn lock(&self) -> MutexGuard<'_, Arc<RegionTable>> {
        // Nothing can panic while the lock is held and leave the Arc half changed.
        self.0.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(
        &self,
        new: impl FnOnce(&RegionTable) -> Result<(Vec<Region>, Option<Arc<DirtyBitmap>>), MemoryError>,
    ) -> Result<Arc<RegionTable>, MemoryError> {
        let mut table = self.lock();
        let (regions, dirty) = new(&table)?;
        let next = Arc::new(RegionTable::new(regions, dirty)?);
        let old = std::mem::replace(&mut *table, next.clone());
        self.0.generation.fetch_add(1, Release);
        drop(table);
        // Unmapping, if this was the last user, happens outside the lock.
        drop(old);
        Ok(next)
    }

    /// Adds a region.
    ///
    /// # Errors
    /// `Overlap` if it shares an address with one that is there.
    pub fn add(&self, region: Region) -> Result<Arc<RegionTable>, MemoryError> {
        self.change(|table| {
            let new_last = region.address() + (region.len() - 1);
            let shares = |old: &&Region| old.address() <= new_last && region.address() <= old.address() + (old.len() - 1);
            if let Some(old) = table.regions().iter().find(shares) {
                let (address, len) = (region.address(), region.len());
                return Err(MemoryError::Overlap { address, len, other_address: old.address(), other_len: old.len() });
            }
            let regions = table.regions().iter().cloned().chain([region]).collect();
            Ok((regions, table.dirty().cloned()))
        })
    }

    /// Removes the region that starts at `address`.
    ///
    /// # Errors
    /// `NoRegion` if none does.
    pub fn remove(&self, address: u64) -> Result<Arc<RegionTable>, MemoryError> {
        self.change(|table| {
            let regions: Vec<Region> = table.regions().iter().filter(|region| region.address() != address).cloned().collect();
            if regions.len() == table.regions().len() {
                return Err(MemoryError::NoRegion { address });
            }
            Ok((regions, table.dirty().cloned()))
        })
    }

    /// Puts these regions, in any order, in the place of all that are there.
    ///
    /// # Errors
    /// `Overlap` if two of them share an address; the old ones stay then.
    pub fn replace(&self, regions: Vec<Region>) -> Result<Arc<RegionTable>, MemoryError> {
        self.change(|table| Ok((regions, table.dirty().cloned())))
    }

    /// Marks writes in this bitmap from the next table on, or no longer. Views see it when they are refreshed.
    pub fn set_dirty(&self, dirty: Option<Arc<DirtyBitmap>>) -> Arc<RegionTable> {
        self.change(|table| Ok((table.regions().to_vec(), dirty))).expect("the same regions overlap no more than before")
    }

    /// The table as it is now.
    pub fn table(&self) -> Arc<RegionTable> {
        self.lock().clone()
    }

    /// How often the set was changed.
    pub fn generation(&self) -> u64 {
        self.0.generation.load(Acquire)
    }

    /// How many regions lie in this mapping.
    pub fn uses(&self, mapping: &Arc<Mapping>) -> usize {
        self.lock().regions().iter().filter(|region| Arc::ptr_eq(region.mapping(), mapping)).count()
    }

    /// A view of the set as it is now.
    pub fn view(&self) -> View {
        let table = self.lock();
        View { memory: self.clone(), generation: self.generation(), table: table.clone() }
    }
}

/// One user's view: a table that stays the same until [`View::refresh`].
#[derive(Clone, Debug)]
pub struct View {
    memory: GuestMemory,
    table: Arc<RegionTable>,
    generation: u64,
}

impl View {
    /// Takes over what changed; true if something did. One load when nothing did.
    #[inline]
    pub fn refresh(&mut self) -> bool {
        if self.memory.generation() == self.generation {
            return false;
        }
        *self = self.memory.view();
        true
    }

    /// The set that this is a view of.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// The table, to be kept.
    pub fn table(&self) -> &Arc<RegionTable> {
        &self.table
    }

    /// Which state of the set this is.
    pub fn generation(&self) -> u64 {
        self.generation
    }
}

impl Deref for View {
    type Target = RegionTable;

    #[inline(always)]
    fn deref(&self) -> &RegionTable {
        &self.table
    }
}
